"""Does double Q-learning help on the grid? Three agents, three worlds, 200 seeds each: a figure and a table.

    python tests/benchmarks/grid_compare.py      (under a minute on two cores)

The figure goes to grid_compare.png, all numbers go to grid_compare.json. The results page and notebook 1 show
them.
"""
import argparse
import itertools
import json
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

if __name__ == "__mp_main__":  # a worker, on systems that do not fork: Ctrl-C is for the main process
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
import grid_qlearning as gq  # noqa: E402

GREEN = "#009E73"
SEEDS = 200
# World: the size of the noise in the rewards, the share of random moves.
# The noise is that of van Hasselt (2010), also on a 3x3 grid: a step costs 12 or pays 10, each half of the time, so
# it costs 1 on average, as without noise. The rest stays ours: 8 moves (his: 4), 0 for the end square (his: 5),
# a constant α (his shrinks). With a constant α of 0.1 a value is roughly the mean of the last 10 targets. It never
# stops scattering, and the maximum over such values stays too high.
# With 10 % random moves the agent chooses an action that looks too good again and again, which corrects its value.
# With random moves only it takes all actions alike, and the bias of the target itself is left.
WORLDS = {"plain": (0, gq.EPSILON), "noisy": (11, gq.EPSILON), "noisy, random moves": (11, 1.0)}
NOISY_EPISODES = 300  # with random moves about 8,000 steps; van Hasselt's figure shows 10,000


# ===== 1. One run. In: a rule, a world, a seed. Out: four numbers and a curve.

class NoisyGrid(gq.Grid):
    """`Grid` with noise (float) added to or taken from each -1. rng (np.random.Generator) tosses the coin."""

    def __init__(self, noise, rng):
        self.noise, self.rng = noise, rng

    def reward(self, next_state):
        if next_state == self.end:
            return 0.0
        return -1.0 + (self.noise if self.rng.random() < 0.5 else -self.noise)


def optimal_values(gamma=gq.GAMMA):
    """Return the true action values, (9, 8) float64, by value iteration. Noise of mean 0 does not change them."""
    grid, values = gq.Grid(), np.zeros((gq.N_STATES, gq.N_ACTIONS))
    for _ in range(gq.N_STATES):  # each pass carries values one step further from the end; no best path has more steps
        best = values.max(axis=1)  # (9, 8) -> (9,)
        for state, action in np.ndindex(values.shape):
            next_state, reward, terminal = grid.step(state, action)
            # Q(s, a) = r + γ max_a' Q(s', a'), without the second part at the end
            values[state, action] = reward if terminal else reward + gamma * best[next_state]
    return values


def run_once(rule, noise, epsilon, episodes, seed):
    """Train one agent. rule: a key of LEARNERS. Return a dict of four numbers and a curve, float64, a value
    for each episode that is drawn."""
    agent = gq.LEARNERS[rule](np.random.default_rng(seed), epsilon=epsilon)
    grid = NoisyGrid(noise, np.random.default_rng([seed, 1]))  # not the agent's generator: the two must not interact
    returns, values, best = np.zeros((3, episodes))  # (episodes,) float64 each
    for episode in range(episodes):
        _, visits = gq.run_episodes(agent, grid, episodes=1)
        returns[episode] = 1 - visits.sum()  # the return without noise: 0 for the last step, -1 for each other
        values[episode] = agent.action_values(grid.start).max()  # (8,) -> float
        best[episode] = gq.greedy_path(agent.best_policy(), max_steps=2)[1] == gq.BEST_RETURN
    last_miss = np.flatnonzero(best == 0).max(initial=-1)  # index of the last episode without the best path
    return {
        "reward": gq.BEST_RETURN / returns.mean(),
        "best_since": int(last_miss) + 2 if last_miss < episodes - 1 else None,  # counted from 1
        "best_share": best.mean(),
        "value": values[-1],
        "curve": values if noise else gq.normalised_average(returns[:gq.PLOTTED]),
    }


# ===== 2. Comparison. In: seeds. Out: a row of numbers for each world and rule.

def mean_band(samples):
    """Take samples, (seeds, ...) float64. Return their mean over the seeds and half of its 95 % interval."""
    samples = np.asarray(samples)
    return samples.mean(axis=0), 1.96 * samples.std(axis=0, ddof=1) / np.sqrt(len(samples))


def compare(seeds, episodes=gq.EPISODES, workers=None):
    """Train each agent in each world with each seed. workers: processes, None for one per core.

    Return a list of rows (dict) that JSON can hold. "reward" to "value" are lists with a number for each seed, "mean"
    and "band" lists with a number for each episode.
    """
    rows = []
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends these
    with ProcessPoolExecutor(workers, initializer=ignore) as pool:
        for (world, (noise, epsilon)), rule in itertools.product(WORLDS.items(), gq.LEARNERS):
            length = min(episodes, NOISY_EPISODES) if noise else episodes
            runs = list(pool.map(partial(run_once, rule, noise, epsilon, length), seeds, chunksize=4))
            row = {"world": world, "learner": gq.LEARNERS[rule].title.removeprefix("Double Q-learning, ")}
            row |= {"episodes": length, "epsilon": epsilon, "seeds": list(seeds)}
            row["true_value"] = optimal_values()[gq.Grid.start].max()
            for key in ("reward", "best_since", "best_share", "value"):
                row[key] = [run[key] for run in runs]
            mean, band = mean_band([run["curve"] for run in runs])  # (seeds, episodes) -> (episodes,) each
            rows.append(row | {"mean": mean.round(4).tolist(), "band": band.round(4).tolist()})
    return rows


# ===== 3. Table and figure. In: the rows. Out: Markdown, a picture, a file of numbers.

def median_span(since):
    """Take, for each seed, the episode from which on its path is the best one (int, None: never). Return the median
    and its 95 % interval as text."""
    since = sorted(np.inf if episode is None else episode for episode in since)
    # The ranks of the interval's ends: the number of seeds below the median is binomial, n/2 ± 1.96 √n / 2.
    rank = max(0, int(len(since) / 2 - 0.98 * len(since) ** 0.5) - 1)
    median, low, high = since[(len(since) - 1) // 2], since[rank], since[-1 - rank]
    text = "never" if low == np.inf else f"{median} ({low} to {high})"
    return text.replace("inf", "never")


def comparison_table(rows):
    """Take the rows of `compare`. Return a table in Markdown. Every ± and "to" is a 95 % interval."""
    heads = ("world", "learner", "normalised reward", "best path from episode on", "never", "% of the time",
             "error of max Q(start)")
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        reward, share, value = (mean_band(row[key]) for key in ("reward", "best_share", "value"))
        lines.append([
            row["world"], row["learner"], f"{reward[0]:.3f} ± {reward[1]:.3f}",
            median_span(row["best_since"]), str(row["best_since"].count(None)),
            f"{100 * share[0]:.1f} ± {100 * share[1]:.1f}", f"{value[0] - row['true_value']:+.2f} ± {value[1]:.2f}",
        ])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def differences_table(rows):
    """Take the rows of `compare`. Return a table of the double rules less Q-learning, seed by seed."""
    heads = ("world", "learner", "normalised reward", "best path, points of %", "value of the start")
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        base, cells = next(other for other in rows if other["world"] == row["world"]), []  # Q-learning is the first
        for key, scale, digits in (("reward", 1, 3), ("best_share", 100, 1), ("value", 1, 2)):
            mean, half = mean_band([scale * (a - b) for a, b in zip(row[key], base[key], strict=True)])
            cells.append(f"{mean:+.{digits}f} ± {half:.{digits}f}")
        if row is not base:
            lines.append([row["world"], row["learner"], *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def save_comparison(path, rows):
    """Write a figure of the rows to path as PNG, and the rows beside it as JSON."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(1, len(WORLDS))
    figure.suptitle(f"Mean of {len(rows[0]['seeds'])} seeds with its 95 % band. "
                    "Dotted: the best path, or the true value", size=15)
    styles = [(gq.BLUE, "-"), (gq.ORANGE, "--"), (GREEN, "-.")] * len(WORLDS)
    for row, ax, (color, style) in zip(rows, axes.repeat(len(gq.LEARNERS)), styles, strict=True):
        mean, band = np.array([row["mean"], row["band"]])  # (episodes,) float64 each
        episode = np.arange(1, len(mean) + 1)  # (episodes,) int64
        ax.plot(episode, mean, style, color=color, label=row["learner"])
        ax.fill_between(episode, mean - band, mean + band, color=color, alpha=0.3, linewidth=0)
        noise = row["world"].split(",")[0]
        ax.set(xlabel="episode", ylabel="estimated value of the start, max Q (units of reward)",
               title=f"Rewards: {noise}. Random moves: {100 * row['epsilon']:g} %")
        ax.axhline(1 if noise == "plain" else row["true_value"], color=gq.GREY, linestyle=":")
    axes[0].set(ylim=(0, 1.08), ylabel=gq.REWARD_LABEL)
    axes[0].legend(loc="lower right")
    gq.save_whole(path, lambda unfinished: figure.savefig(unfinished, format="png", dpi=120))
    text = "[" + ",\n".join(json.dumps(row) for row in rows) + "]\n"  # a line for each row
    gq.save_whole(path.with_suffix(".json"), lambda unfinished: unfinished.write_text(text))


# ===== 4. Command line. In: flags. Out: a table, a picture, a file of numbers.

def stop(*_):
    print("grid_compare.py: stopped by Ctrl-C", file=sys.stderr)
    raise SystemExit(130)


def main(argv=None):
    """Compare the agents, save the figure and print the table. argv: list of str, or None for the command line."""
    parser = argparse.ArgumentParser("grid_compare.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {' '.join(message.split())}\n")  # one line
    parser.add_argument("--seeds", type=gq.between(int, 2, 10_000), default=SEEDS, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder (default: results/)")
    settings = parser.parse_args(argv)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        print(f"Training with {settings.seeds} seeds; 200 take less than a minute on two cores.\n", flush=True)
        rows = compare(range(settings.seeds))
        save_comparison(settings.out / "grid_compare.png", rows)
        print(f"{comparison_table(rows)}\n\nFigure and numbers: grid_compare.png, grid_compare.json", flush=True)
    except OSError as error:
        sys.stdout = None  # otherwise Python prints the rest when it ends, and fails once more
        parser.error(f"cannot save or print the result: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    sys.stdout.reconfigure(encoding="utf-8")  # ± and α, whatever the terminal's encoding is
    main()
