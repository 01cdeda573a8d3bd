"""Does "double" help Mario? Single, the tutorial's double and van Hasselt's, all else equal, from results/double.

    python tests/benchmarks/double_or_not.py                   the figure (double.png) and the tables, from double.json
    python tests/benchmarks/double_or_not.py --collect RUNS    first makes double.json from the runs RUNS/RULE-SEED

Each run is made by mario_ddqn.py with its default settings, but 160,000 steps, one for every rule and seed:

    python mario_ddqn.py --double single --seed 0 --steps 160000 --out RUNS/single-0

`--collect` keeps steps, return and clear of each episode, and lets the network play 50 greedy games after idle starts.
They give its clear rate and the overestimate: the mean Q of the greedy actions it played, less the mean discounted
return that followed them, in points (van Hasselt, Guez and Silver 2016, figure 3).
"""
import argparse
import json
import sys
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
import mario_ddqn as m  # noqa: E402

DATA = ROOT / "results" / "double"
NAMES = {"single": "single", "tutorial": "the tutorial's double", "hasselt": "van Hasselt's double"}
COLOURS = {"single": "#0072B2", "tutorial": "#E69F00", "hasselt": "#009E73"}
MARKS = (50_000, 100_000, 150_000)
GAMES = 50  # greedy ones of each run
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's t


def play(network, games, seed=0):
    """Greedy games after idle starts: how many were cleared, and two means over games, in points: Q of the greedy
    actions, and the discounted return that followed them (what is learnt from: with the bonus for the flag)."""
    _, q_values, settings = m.load_network(network)
    env, cleared, found = m.make_env(settings.stage, settings.show_jump), 0, []
    for number in m.tqdm(range(games), unit="game"):
        episode, values, returns = m.Episode(m.np.random.default_rng([seed, number]), "noop"), [], []

        def show(picture, state, q, episode, values=values, returns=returns):
            values.append(q.max() / settings.reward_scale)
            returns.append(episode.total_reward)

        end, _ = m.play_episode(env, q_values, episode, show)
        cleared += end == "cleared"
        values.pop()  # the end is no choice
        returns[-1] += settings.flag_bonus * (end == "cleared")
        last = len(values) - 100 * (end == "out of time")  # a game that was broken off has no whole returns at its end
        pairs = discounted(values, m.np.diff(returns), settings.gamma)[:last]
        found += [m.np.mean(pairs, axis=0)] if pairs else []
    return cleared, *m.np.mean(found, axis=0).tolist()


def discounted(values, rewards, gamma):
    """[(Q, discounted return from there on)] of each step."""
    came = list(accumulate(reversed(rewards), lambda later, reward: reward + gamma * later))  # G_t = r_t + γ G_{t+1}
    return list(zip(values, reversed(came), strict=True))


def collect(runs):
    """One dict per run in that folder."""
    found = []
    for network in sorted(runs.glob("*-*/network.pt")):
        rule, seed = network.parent.name.split("-")
        cleared, q, came = play(network, GAMES)
        found.append({"rule": rule, "seed": int(seed), **summary(m.read_rows(network.parent), MARKS),
                      "greedy_clears": cleared, "greedy_episodes": GAMES, "q": q, "discounted_return": came,
                      "overestimate": q - came})
    return found


def summary(rows, marks):
    """What is kept of the rows of a run: its first clear, its figures at the marks, and the columns of its curve."""
    first = next((row["env_steps"] for row in rows if row["cleared"]), None)
    curve = {name: [row[name] for row in rows] for name in ("env_steps", "return", "cleared")}
    return {"first_clear": first, **at(rows, marks), **curve}


def write(path, found):
    m.write_atomically(path, ("[" + ",\n".join(map(json.dumps, found)) + "]\n").encode())  # a line for each run


def last_hundred(rows, mark):
    """The last 100 episodes that had ended after `mark` environment steps."""
    return [row for row in rows if row["env_steps"] <= mark][-100:]


def rolling(run, window=100):
    """(steps, mean return, share cleared) of the last `window` episodes, at the end of each episode after them."""
    for k in range(window, len(run["return"]) + 1):
        yield run["env_steps"][k - 1], fmean(run["return"][k - window:k]), fmean(run["cleared"][k - window:k])


def at(rows, marks):
    """Mean return and clears of the last 100 episodes that had ended after so many steps, for each mark."""
    figures = {}
    for mark in marks:
        last = last_hundred(rows, mark)
        figures[f"return at {mark}"] = fmean(row["return"] for row in last)
        figures[f"clears at {mark}"] = sum(row["cleared"] for row in last)
    return figures


def band(values):
    """mean ± half the 95 % interval (Student's t)."""
    return fmean(values), T_95[len(values)] * stdev(values) / len(values) ** 0.5


COLUMNS = {"first_clear": "first clear, steps", **{f"return at {mark}": f"return at {mark:,}" for mark in MARKS},
           **{f"clears at {mark}": f"clears at {mark:,}" for mark in MARKS[1:]},
           "greedy_clears": f"greedy clears of {GAMES}", "q": "Q, points",
           "discounted_return": "discounted return", "overestimate": "overestimate"}


def table(found):
    """Every run's figures, one column each with the seeds side by side; then the differences from single, paired."""
    by = {rule: {run["seed"]: run for run in found if run["rule"] == rule} for rule in NAMES}
    lines = ["| | " + " | ".join(NAMES.values()) + " |", "| --- " * (len(NAMES) + 1) + "|"]
    for column, label in COLUMNS.items():
        cells = [" · ".join("–" if (value := run[column]) is None else f"{value:,.0f}" for run in by[rule].values())
                 for rule in NAMES]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "Less single, seed by seed: mean difference ± half the 95 % interval.", "",
              "| | " + " | ".join([*NAMES.values()][1:]) + " |", "| --- " * len(NAMES) + "|"]
    for column, label in COLUMNS.items():
        cells = []
        for rule in [*NAMES][1:]:
            gaps = [run[column] - by["single"][seed][column] for seed, run in by[rule].items()
                    if seed in by["single"] and None not in (run[column], by["single"][seed][column])]
            cells.append(f"{round(band(gaps)[0]):+,} ± {band(gaps)[1]:,.0f}" if len(gaps) > 1 else "–")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found):
    figure = m.Figure(figsize=(13, 4.4), layout="constrained")
    returns, clears, values = figure.subplots(1, 3)
    for k, run in enumerate(found):
        label = NAMES[run["rule"]] if run["rule"] != found[k - 1]["rule"] else None
        style = {"color": COLOURS[run["rule"]], "label": label}
        steps, mean_return, share = zip(*rolling(run), strict=True)
        returns.plot(steps, mean_return, linewidth=1.4, **style)
        clears.plot(steps, [100 * value for value in share], linewidth=1.4, **style)
        values.plot(run["discounted_return"], run["q"], "o", markersize=9, **style)
        values.annotate(f" {run['seed']}", (run["discounted_return"], run["q"]), fontsize=9)
    returns.set(xlabel="environment steps", ylabel="mean return of the last 100 episodes")
    returns.legend(title="one line per seed", fontsize=9)
    clears.set(xlabel="environment steps", ylabel="cleared of the last 100 episodes")
    low, high = (pick(run[name] for run in found for name in ("q", "discounted_return")) for pick in (min, max))
    values.plot([low, high], [low, high], color="grey", linestyle="--", linewidth=1, label="no overestimate")
    values.set(xlabel="discounted return that came (points)", ylabel="Q of the chosen actions (points)")
    values.legend(title="number: seed", fontsize=9)
    for axes in (returns, clears):
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
    for axes in (returns, clears, values):
        axes.grid(alpha=0.3)
    figure.savefig(DATA / "double.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, metavar="RUNS", help="the folder of the finished runs")
    args = parser.parse_args()
    if args.collect:
        write(DATA / "double.json", collect(args.collect))
    found = json.loads((DATA / "double.json").read_text())
    draw(found)
    print(table(found))


if __name__ == "__main__":
    main()
