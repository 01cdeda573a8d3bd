"""What does each ingredient of the default settings bring? One switched off at a time, from results/ablation.

    python tests/benchmarks/ablation.py --commands RUNS   prints the trainings to be made, one a line
    python tests/benchmarks/ablation.py --collect RUNS    puts the runs RUNS/NAME-SEED into ablation.json
    python tests/benchmarks/ablation.py                   the figure (ablation.png) and the table, from ablation.json

A run differs from the default in what its settings.json says.
"""
import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from double_or_not import rolling, summary, write  # beside this file

import mario_ddqn as m

RESULTS = Path(__file__).resolve().parents[2] / "results"
MARKS = (20_000, 40_000, 60_000)
LAST = MARKS[-1]
WITHOUT = {  # name of the run: flags
    "default": [], "one-network": ["--double", "single"], "one-step-returns": ["--n-step", 1],
    "unscaled-reward": ["--reward-scale", 1], "uniform-replay": ["--priority", 0], "jump-not-shown": ["--no-show-jump"],
    "no-flag-bonus": ["--flag-bonus", 0], "endless-patience": ["--patience", 10**6], "no-idle-starts": ["--train-noise",
    "none"], "constant-learning-rate": ["--lr-end", m.Settings.lr], "no-practice": ["--practice", 0]}


def commands(runs, seeds, steps):
    for name, flags in WITHOUT.items():
        for seed in range(seeds):
            print(m.command("--double", *flags, "--seed", seed, "--steps", steps, "--out", runs / f"{name}-{seed}"))


def collect(runs, found):
    """One dict per run, those `found` before and those in that folder: the ingredient, what its settings differ in from
    the default ones, and how far it came."""
    default = {**asdict(m.Settings()), "double": "tutorial", "steps": LAST}
    found = {(run["name"], run["seed"]): run for run in found}
    for path in sorted(runs.glob("*-*/settings.json")):
        (name, seed), settings = path.parent.name.rsplit("-", 1), json.loads(path.read_text())
        changed = {key: value for key, value in settings.items() if value != default[key] and key != "seed"}
        name, seed = name.replace("-", " "), int(seed)
        found[name, seed] = {"name": name, "seed": seed, "changed": changed,
                             **summary(m.read_rows(path.parent), MARKS)}
    return [found[key] for key in sorted(found)]


def by_name(found):
    """{ingredient: its runs by seed}: the default first, then the others, the most missed first. {ingredient: by how
    much each of them is above the default with its seed, in return}."""
    runs = {}
    for run in sorted(found, key=lambda run: run["seed"]):
        runs.setdefault(run["name"], []).append(run)
    default = {run["seed"]: run for run in runs["default"]}
    gaps = {name: [run[f"return at {LAST}"] - default[run["seed"]][f"return at {LAST}"] for run in part]
            for name, part in runs.items()}
    return {name: runs[name] for name in sorted(runs, key=lambda name: (name != "default", fmean(gaps[name])))}, gaps


def table(found):
    runs, gaps = by_name(found)
    lines = ["| run | what differs | first clear, steps | " + " | ".join(f"return at {mark:,}" for mark in MARKS)
             + f" | clears at {LAST:,} | return at {LAST:,} less the default's |", "| --- " * (5 + len(MARKS)) + "|"]
    for name, part in runs.items():
        changed = ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                            for key, value in part[0]["changed"].items())
        firsts = (run["first_clear"] for run in part)
        cells = [name, changed, " · ".join(f"{first:,.0f}" if first else "none" for first in firsts),
                 *(" · ".join(f"{run[f'return at {mark}']:,.0f}" for run in part) for mark in MARKS),
                 " · ".join(f"{run[f'clears at {LAST}']:.0f}" for run in part),
                 "" if name == "default" else " · ".join(f"{gap:+,.0f}" for gap in gaps[name])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found):
    runs, _ = by_name(found)
    figure = m.Figure(figsize=(13, 5), layout="constrained")
    curves, dots = figure.subplots(1, 2, width_ratios=(3, 2))
    steps = m.np.arange(12_000, LAST + 1, 500)
    for k, (name, part) in enumerate(runs.items()):
        color, width = ("black", 3) if name == "default" else (m.COLOURS[(k - 1) % len(m.COLOURS)], 1.6)
        ways = [m.np.interp(steps, *[*zip(*rolling(run), strict=True)][:2], left=m.np.nan) for run in part]
        curves.plot(steps, m.np.mean(ways, axis=0), color=color, linewidth=width, label=name,
                    linestyle="-" if k <= len(m.COLOURS) else "--")
        for run in part:
            dots.plot(run[f"return at {LAST}"], k, "o", color=color, markersize=8)
            dots.annotate(f" {run['seed']}", (run[f"return at {LAST}"], k), fontsize=9)
    values = [run[f"return at {LAST}"] for run in runs["default"]]
    dots.axvspan(min(values), max(values), color="black", alpha=0.1)
    dots.set_yticks(range(len(runs)), runs)
    dots.invert_yaxis()
    dots.set_xlabel(f"mean return of the last 100 episodes at {LAST:,} steps\n(number: seed; grey: default)")
    curves.set(xlabel="environment steps", ylabel="mean return of the last 100 episodes,\nmean of two seeds")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9)
    for axes in (curves, dots):
        axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "ablation" / "ablation.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=Path, metavar="RUNS", help="print the trainings, with their folders there")
    parser.add_argument("--seeds", type=int, default=2, help="of --commands (default: 2)")
    parser.add_argument("--steps", type=int, default=LAST, help=f"of --commands (default: {LAST})")
    parser.add_argument("--collect", type=Path, metavar="RUNS", help="the folder of the finished runs")
    args = parser.parse_args()
    if args.commands:
        return commands(args.commands, args.seeds, args.steps)
    path = RESULTS / "ablation" / "ablation.json"
    found = json.loads(path.read_text())
    if args.collect:
        write(path, found := collect(args.collect, found))
    draw(found)
    print(table(found))


if __name__ == "__main__":
    main()
