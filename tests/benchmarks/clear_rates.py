"""How often do trainings with the default settings clear a level? The reward curves and the tables of some seeds.

    python tests/benchmarks/clear_rates.py --commands RUNS   prints the trainings and evaluations to be made
    python tests/benchmarks/clear_rates.py --collect RUNS    copies what they wrote to results/training, and one network
                                                             to results/
    python tests/benchmarks/clear_rates.py                   the figure (rewards.png) and the tables

All three take --stage 1-2 and the like; the tables of that level lie in results/world/1-2. The network that comes with
the program is the one whose clears after idle starts are nearest to the mean of the seeds.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
import mario_ddqn as m  # noqa: E402

DATA = ROOT / "results" / "training"
MARKS = (25_000, 50_000, 100_000, 200_000, m.Settings.steps)
NOISES = {"noop": "after 0 to 30 idle steps", "epsilon": "with 5 % random actions", "sticky": "with sticky actions"}


def data_of(stage):
    return DATA if stage == "1-1" else ROOT / "results" / "world" / stage


def commands(runs, seeds, stage):
    for seed in range(seeds):
        run = runs / f"seed-{seed}"
        print(m.command("--double", "--stage", stage, "--seed", seed, "--out", run))
        for noise in m.NOISES:
            print(m.command("--evaluate", run, "--noise", noise))


def collect(runs, stage):
    data = data_of(stage)
    for run in sorted(runs.glob("seed-*")):
        (data / run.name).mkdir(parents=True, exist_ok=True)
        for path in [run / "episodes.csv", run / "settings.json", *run.glob("evaluation-*.json")]:
            shutil.copy(path, data / run.name)
    cleared = {name: evaluations["noop"]["cleared"] for name, (_, evaluations) in trainings(data).items()}
    nearest = min(cleared, key=lambda name: abs(cleared[name] - fmean(cleared.values())))
    print(f"{nearest} comes with the program")
    shutil.copy(runs / nearest / "network.pt", m.TRAINED / f"mario_{stage}.pt")
    for noise in m.NOISES:
        shutil.copy(runs / nearest / f"evaluation-{noise}.json", m.TRAINED / f"evaluation-mario_{stage}-{noise}.json")


def trainings(data=DATA):
    """{name: (rows, {noise: evaluation})} of the trainings in that folder that are evaluated."""
    found = {}
    for run in sorted(path.parent for path in data.glob("*/evaluation-noop.json")):
        evaluations = [json.loads(path.read_text()) for path in run.glob("evaluation-*.json")]
        found[run.name] = m.read_rows(run), {evaluation["noise"]: evaluation for evaluation in evaluations}
    return found


def at(mark, data=DATA):
    """After so many steps: the minutes, and of the last 100 games the mean return and the clears; a list by seed."""
    minutes, returns, clears = [], [], []
    for rows, _ in trainings(data).values():
        last = [row for row in rows if row["env_steps"] <= mark][-100:]
        minutes.append(last[-1]["seconds"] / 60)
        returns.append(fmean(row["return"] for row in last))
        clears.append(sum(row["cleared"] for row in last))
    return minutes, returns, clears


def way_table(data=DATA):
    """How far the training games of each seed came."""
    lines = ["| after | minutes | mean return of the last 100 games | cleared of them |", "| --- " * 4 + "|"]
    for mark in MARKS:
        cells = (" · ".join(f"{value:,.0f}" for value in values) for values in at(mark, data))
        lines.append(f"| {mark:,} steps | {' | '.join(cells)} |")
    return "\n".join(lines)


def rates_table(data=DATA):
    """How often the network of each training clears the level."""
    lines = ["| run | steps | games | return | first clear | `none` | `noop` | `epsilon` | `sticky` |",
             "| --- " * 9 + "|"]
    for name, (rows, found) in trainings(data).items():
        clears = (f"{row['env_steps']:,} steps, {row['seconds'] / 60:.0f} min" for row in rows if row["cleared"])
        last = fmean(row["return"] for row in rows[-100:])
        cells = [name, f"{rows[-1]['env_steps']:,}", f"{len(rows):,}", f"{last:,.0f}", next(clears, "none")]
        for noise in m.NOISES:
            text = "{cleared} of {episodes}" if noise == "none" else "{cleared} of {episodes} ({:.0%} to {:.0%})"
            cells.append(text.format(*found[noise]["wilson_95"], **found[noise]) if noise in found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def means(data=DATA):
    """One sentence: the share of games cleared, mean over the seeds, for each noise."""
    found = [evaluations for _, evaluations in trainings(data).values()]
    shares = {noise: fmean(one[noise]["cleared"] / one[noise]["episodes"] for one in found) for noise in NOISES}
    said = ", ".join(f"{100 * shares[noise]:.0f} % {words}" for noise, words in NOISES.items())
    return f"Games cleared, mean over {len(found)} trainings: {said}."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=Path, metavar="RUNS", help="print the commands, with their folders there")
    parser.add_argument("--seeds", type=int, default=5, help="of --commands (default: 5)")
    parser.add_argument("--collect", type=Path, metavar="RUNS", help="the folder of the finished runs")
    parser.add_argument("--stage", choices=m.STAGES, default="1-1")
    args = parser.parse_args()
    if args.commands:
        return commands(args.commands, args.seeds, args.stage)
    if args.collect:
        collect(args.collect, args.stage)
    data = data_of(args.stage)
    m.plot_rewards([data / name for name in trainings(data)], data / "rewards.png")
    print(way_table(data), rates_table(data), means(data), sep="\n\n")


if __name__ == "__main__":
    main()
