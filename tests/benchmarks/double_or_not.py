"""Does "double" help Mario? Single, the tutorial's double and van Hasselt's, all else equal, from results/double.

    python tests/benchmarks/double_or_not.py                   the figure (double.png) and the tables (double.json)
    python tests/benchmarks/double_or_not.py --collect RUNS    first takes finished runs over from there: RULE-SEED

Each run is made by mario_ddqn.py with its default settings, one thread of PyTorch and 160,000 steps:

    python mario_ddqn.py                  --seed 0 --steps 160000 --eval-every 40000 --threads 1 --name single-0
    python mario_ddqn.py --double         --seed 0 --steps 160000 --eval-every 40000 --threads 1 --name tutorial-0
    python mario_ddqn.py --double hasselt --seed 0 --steps 160000 --eval-every 40000 --threads 1 --name hasselt-0

and so on for every seed. `--collect` copies its rows and settings and lets its last network play 50 greedy episodes
after idle starts, which gives its clear rate and the overestimate: the mean Q of the actions it chose, less the mean
discounted return that followed them, in points (van Hasselt, Guez and Silver 2016, figure 3).
"""
import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from readme import last_hundred  # noqa: E402

import mario_ddqn  # noqa: E402

DATA = ROOT / "results" / "double"
NAMES = {"single": "single", "tutorial": "the tutorial's double", "hasselt": "van Hasselt's double"}
COLOURS = {"single": "#0072B2", "tutorial": "#E69F00", "hasselt": "#009E73"}
MARKS = (50_000, 100_000, 150_000)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # Student's t


def take_over(run, folder):
    """The rows and settings of a run, to be kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("episodes.csv", "settings.json"):
        shutil.copy(run / name, folder)


def collect(runs, episodes):
    for run in sorted(runs.glob("*-*")):
        if run.name.split("-")[0] not in NAMES or not (run / "last.pt").exists():
            continue
        take_over(run, DATA / run.name)
        out = DATA / run.name / "evaluation-noop.json"
        if mario_ddqn.main(["--evaluate", str(run / "last.pt"), "--noise", "noop", "--episodes", str(episodes),
                            "--out", str(out)]):
            sys.exit(2)


def rolling(rows, window=100):
    """(steps, mean return, share cleared) of the last `window` episodes, at the end of each episode after them."""
    for k in range(window, len(rows) + 1):
        last = rows[k - window:k]
        yield last[-1]["env_steps"], fmean(row["return"] for row in last), fmean(row["cleared"] for row in last)


def at(rows, marks):
    """Mean return and clears of the last 100 episodes that had ended after so many steps, for each mark."""
    figures = {}
    for mark in marks:
        last = last_hundred(rows, mark)
        figures[f"return at {mark}"] = fmean(row["return"] for row in last)
        figures[f"clears at {mark}"] = sum(row["cleared"] for row in last)
    return figures


def measure():
    """One dict per run, from the files in results/double."""
    found = []
    for folder in sorted(DATA.glob("*-*")):
        rule, seed = folder.name.split("-")
        rows = mario_ddqn.read_rows(folder / "episodes.csv")
        exam = json.loads((folder / "evaluation-noop.json").read_text())
        first = next((row["env_steps"] for row in rows if row["cleared"]), None)
        found.append({"rule": rule, "seed": int(seed), "steps": rows[-1]["env_steps"], "first_clear": first,
                      **at(rows, MARKS),
                      "greedy_clears": exam["cleared"], "greedy_episodes": exam["episodes"], "q": exam["q"],
                      "discounted_return": exam["discounted_return"],
                      "overestimate": exam["q"] - exam["discounted_return"]})
    return found


def band(values):
    """mean ± half the 95 % interval (Student's t)."""
    return fmean(values), T_95[len(values)] * stdev(values) / len(values) ** 0.5


COLUMNS = {"first_clear": "first clear, steps", **{f"return at {mark}": f"return at {mark:,}" for mark in MARKS},
           **{f"clears at {mark}": f"clears at {mark:,}" for mark in MARKS[1:]}, "greedy_clears": "greedy clears of 50",
           "q": "Q, points", "discounted_return": "what came", "overestimate": "overestimate"}


def table(found):
    """Every run's figures, one column each with the seeds side by side; then the differences from single, paired."""
    rules = [rule for rule in NAMES if any(run["rule"] == rule for run in found)]
    by = {rule: sorted((run for run in found if run["rule"] == rule), key=lambda run: run["seed"]) for rule in rules}
    lines = ["| | " + " | ".join(NAMES[rule] for rule in rules) + " |", "| --- " * (len(rules) + 1) + "|"]
    for column, label in COLUMNS.items():
        cells = [" · ".join("–" if (value := run[column]) is None else f"{value:,.0f}" for run in by[rule])
                 for rule in rules]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "Less single, seed by seed: mean difference ± half the 95 % interval.", "",
              "| | " + " | ".join(NAMES[rule] for rule in rules[1:]) + " |", "| --- " * len(rules) + "|"]
    for column, label in COLUMNS.items():
        cells = []
        for rule in rules[1:]:
            pairs = [(run[column], other[column]) for run in by[rule] for other in by["single"]
                     if run["seed"] == other["seed"] and None not in (run[column], other[column])]
            cells.append("{:+,.0f} ± {:,.0f}".format(*band([a - b for a, b in pairs])) if len(pairs) > 1 else "–")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found):
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    returns, clears, promise = figure.subplots(1, 3)
    for rule, colour in COLOURS.items():
        for k, run in enumerate(run for run in found if run["rule"] == rule):
            rows = mario_ddqn.read_rows(DATA / f"{rule}-{run['seed']}" / "episodes.csv")
            steps, mean_return, share = zip(*rolling(rows), strict=True)
            label = NAMES[rule] if k == 0 else None
            returns.plot(steps, mean_return, color=colour, linewidth=1.4, label=label)
            clears.plot(steps, [100 * value for value in share], color=colour, linewidth=1.4)
            promise.plot(run["discounted_return"], run["q"], "o", color=colour, markersize=9, label=label)
            promise.annotate(f" {run['seed']}", (run["discounted_return"], run["q"]), fontsize=9)
    returns.set(xlabel="environment steps", ylabel="mean return of the last 100 episodes")
    returns.legend(title="one line per seed", fontsize=9)
    clears.set(xlabel="environment steps", ylabel="cleared of the last 100 episodes")
    low, high = (pick(run[name] for run in found for name in ("q", "discounted_return")) for pick in (min, max))
    promise.plot([low, high], [low, high], color="grey", linestyle="--", linewidth=1, label="no overestimate")
    promise.set(xlabel="discounted return that came (points)", ylabel="Q of the chosen actions (points)")
    promise.legend(title="number: seed", fontsize=9)
    for axes in (returns, clears):
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
    for axes in (returns, clears, promise):
        axes.grid(alpha=0.3)
    mario_ddqn.write_atomically(DATA / "double.png", lambda file: figure.savefig(file, format="png", dpi=110))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, metavar="RUNS", help="take the runs in this folder over first")
    parser.add_argument("--episodes", type=int, default=50, help="greedy episodes of each run (default: 50)")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect, args.episodes)
    found = measure()
    mario_ddqn.write_json(DATA / "double.json", found)
    draw(found)
    print(table(found))


if __name__ == "__main__":
    main()
