"""What does each ingredient of the default settings bring? One switched off at a time, from results/ablation.

    python tests/benchmarks/ablation.py                   the figure (ablation.png) and the table (ablation.json)
    python tests/benchmarks/ablation.py --collect RUNS    first takes finished runs over from there: NAME-SEED

The default settings are the runs "tutorial" of results/double, and one network instead of two the runs "single"
there. Each run in results/ablation differs from the default in what its settings.json says, and was made with one
thread of PyTorch, 60,000 steps and no exams (they change nothing):

    python mario_ddqn.py --double --seed 0 --steps 60000 --eval-every 0 --threads 1 --name n-step-1-0 --n-step 1
"""
import argparse
from pathlib import Path
from statistics import fmean

import numpy as np
from double_or_not import at, rolling, take_over  # beside this file
from matplotlib.figure import Figure

import mario_ddqn

RESULTS = Path(__file__).resolve().parents[2] / "results"
MARKS = (20_000, 40_000, 60_000)
LAST = MARKS[-1]
# What a run may differ in without being another ingredient: who it is, how long it ran, how it was examined.
ASIDE = {*mario_ddqn.LIMITS, "seed", "eval_every", "eval_episodes", "preset"}


def collect(runs):
    for run in sorted(path.parent for path in runs.glob("*/rewards.png")):  # the picture comes last: a finished run
        take_over(run, RESULTS / "ablation" / run.name)


def measure():
    """One dict per run: the ingredient, what its settings differ in from the default ones, and how far it came."""
    defaults = sorted((RESULTS / "double").glob("tutorial-*"))
    default = {key: value for folder in defaults for key, value in mario_ddqn.read_settings(folder).items()}
    found = []
    for folder in [*defaults, *sorted((RESULTS / "double").glob("single-*")),
                   *sorted((RESULTS / "ablation").glob("*-*/"))]:
        name, seed = folder.name.rsplit("-", 1)
        settings = mario_ddqn.read_settings(folder)
        changed = {key: value for key, value in settings.items() if key not in ASIDE and value != default[key]}
        rows = mario_ddqn.read_rows(folder / "episodes.csv")
        first = next((row["env_steps"] for row in rows if row["cleared"] and row["env_steps"] <= LAST), None)
        found.append({"name": "default" if folder in defaults else name.replace("-", " "),
                      "seed": int(seed), "changed": changed, "folder": str(folder.relative_to(RESULTS)),
                      "first_clear": first, **at(rows, MARKS)})
    return found


def by_name(found):
    """{ingredient: its runs by seed}: the default first, then the others, the most missed first."""
    runs = {}
    for run in sorted(found, key=lambda run: run["seed"]):
        runs.setdefault(run["name"], []).append(run)
    default = {run["seed"]: run for run in runs["default"]}
    gap = {name: fmean(run[f"return at {LAST}"] - default[run["seed"]][f"return at {LAST}"] for run in part)
           for name, part in runs.items()}
    return {name: runs[name] for name in sorted(runs, key=lambda name: (name != "default", gap[name]))}, gap


def table(found):
    runs, gap = by_name(found)
    lines = ["| run | what differs | first clear, steps | " + " | ".join(f"return at {mark:,}" for mark in MARKS)
             + f" | clears at {LAST:,} | return at {LAST:,} less the default's |", "| --- " * (5 + len(MARKS)) + "|"]
    for name, part in runs.items():
        changed = " ".join(f"--{key.replace('_', '-')} {value:g}" if isinstance(value, float) else
                           f"--{key.replace('_', '-')} {value}" for key, value in part[0]["changed"].items())
        cells = [name, f"`{changed}`" if changed else "",
                 " · ".join("none" if run["first_clear"] is None else f"{run['first_clear']:,}" for run in part),
                 *(" · ".join(f"{run[f'return at {mark}']:,.0f}" for run in part) for mark in MARKS),
                 " · ".join(str(run[f"clears at {LAST}"]) for run in part),
                 "" if name == "default" else f"{gap[name]:+,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found):
    runs, _ = by_name(found)
    figure = Figure(figsize=(13, 5), layout="constrained")
    curves, dots = figure.subplots(1, 2, width_ratios=(3, 2))
    steps = np.arange(12_000, LAST + 1, 500)
    for k, (name, part) in enumerate(runs.items()):
        color, width = ("black", 3) if name == "default" else (f"C{k - 1}", 1.6)
        ways = [zip(*rolling(mario_ddqn.read_rows(RESULTS / run["folder"] / "episodes.csv")), strict=True)
                for run in part]
        curves.plot(steps, np.mean([np.interp(steps, at_step, mean, left=np.nan) for at_step, mean, _ in ways], 0),
                    color=color, linewidth=width, label=f"{name} ({len(part)} seeds)")
        for run in part:
            dots.plot(run[f"return at {LAST}"], k, "o", color=color, markersize=8)
            dots.annotate(f" {run['seed']}", (run[f"return at {LAST}"], k), fontsize=9,
                          va="top" if run["seed"] % 2 else "bottom")
    values = [run[f"return at {LAST}"] for run in runs["default"]]
    dots.axvspan(min(values), max(values), color="black", alpha=0.1)
    dots.set_yticks(range(len(runs)), runs)
    dots.invert_yaxis()
    dots.set_xlabel(f"mean return of the last 100 episodes at {LAST:,} steps\n(number: seed; grey: default)")
    curves.set(xlabel="environment steps", ylabel="mean return of the last 100 episodes, mean of the seeds")
    curves.legend(fontsize=9)
    for axes in (curves, dots):
        axes.grid(alpha=0.3)
    mario_ddqn.write_atomically(RESULTS / "ablation" / "ablation.png",
                                lambda file: figure.savefig(file, format="png", dpi=110))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, metavar="RUNS", help="take the runs in this folder over first")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect)
    found = measure()
    mario_ddqn.write_json(RESULTS / "ablation" / "ablation.json", found)
    draw(found)
    print(table(found))


if __name__ == "__main__":
    main()
