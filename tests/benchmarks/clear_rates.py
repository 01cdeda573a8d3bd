"""How often do trainings with --double clear a level? The reward curves and the tables of some seeds.

    python tests/benchmarks/clear_rates.py --commands RUNS   prints the trainings and evaluations to be made
    python tests/benchmarks/clear_rates.py --collect RUNS    copies what they wrote to results/training, and one network
                                                             with a clip of its play to results/
    python tests/benchmarks/clear_rates.py                   the figure and the tables

All three take --stage 1-2 and the like; the runs of levels other than 1-1 are collected in results/world. The network
that comes with the program is the one whose clears after idle starts are nearest to the mean of the seeds. The run
that --stage 1-1,1-2,1-3,1-4 collects, one network for the four levels, does not come with the program.
"""
import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
from double_or_not import last_hundred, write  # noqa: E402 - beside this file

import mario_ddqn as m  # noqa: E402

DATA = ROOT / "results" / "training"
WORLD = ROOT / "results" / "world"
SHIPPED = ROOT / "results" / "evaluations.json"  # of the networks that come with the program
TOGETHER = WORLD / "all-four" / "evaluations.json"  # of one network for four levels
TWO_CORES = 2  # the seed whose training had both cores of the machine; the others had one each
ALL_FOUR = "1-1,1-2,1-3,1-4"
FLAG, TREE = ["--gamma", 0.97, "--flag-bonus", 500], ["--search", 0.5, "--practice", 0.75]
# By level, beside --double:
NEEDS = {"1-2": FLAG, "1-3": ["--gamma", 0.97, *TREE, "--steps", 600_000], ALL_FOUR: [*FLAG, *TREE]}
MARKS = (25_000, 50_000, 100_000, 200_000, m.Settings.steps)
MEANINGS = {"none": "nothing: one game", "noop": "0 to 30 idle steps first, as in training: at most 31 different games",
            "epsilon": "a random action instead, with probability 0.05",
            "sticky": "the last action again, with probability 0.25"}
NOISE_WORDS = {"noop": "after 0 to 30 idle steps", "epsilon": "with 5 % random actions",
               "sticky": "with actions repeated at random"}


def commands(runs, seeds, stage):
    for seed in range(seeds):
        run = runs / f"seed-{seed}"
        print(m.command("--double", "--stage", stage, *NEEDS.get(stage, []), "--seed", seed, "--out", run))
        for level in stage.split(","):
            for noise in m.NOISES:
                print(m.command("--evaluate", run, "--noise", noise, *(["--stage", level] if level != stage else [])))


def read_evaluations(path):
    """{level: {noise: evaluation}} of a file that holds several."""
    found = {}
    for evaluation in json.loads(path.read_text()):
        found.setdefault(evaluation["stage"], {})[evaluation["noise"]] = evaluation
    return found


def write_evaluations(path, found):
    write(path, [found[stage][noise] for stage in sorted(found) for noise in m.NOISES if noise in found[stage]])


def collect_all_four(run):
    """The run of several levels, with its evaluations in one file, and its figure."""
    folder = TOGETHER.parent
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("episodes.csv", "settings.json"):
        shutil.copy(run / name, folder)
    found = {stage: evaluations_of(run, f"{stage}-") for stage in ALL_FOUR.split(",")}
    write_evaluations(TOGETHER, found)


def collect(runs, stage):
    data, prefix = (DATA, "") if stage == "1-1" else (WORLD, f"{stage}-")
    for run in sorted(runs.glob("seed-*")):
        folder = data / f"{prefix}{run.name}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(run / "episodes.csv", folder)
        if data == WORLD:  # one file instead of four; the settings are those that --commands prints
            write_evaluations(folder / "evaluations.json", {stage: evaluations_of(run)})
        else:
            for path in [run / "settings.json", *run.glob("evaluation-*.json")]:
                shutil.copy(path, folder)
    cleared = {name.removeprefix(prefix): evaluations["noop"]["cleared"]
               for name, (_, evaluations) in trainings(data, f"{prefix}seed-*").items()}
    nearest = min(cleared, key=lambda name: abs(cleared[name] - fmean(cleared.values())))
    print(f"{nearest} comes with the program")
    if (runs / nearest).exists():  # else it is one of before
        shutil.copy(runs / nearest / "network.pt", m.TRAINED / f"mario_{stage}.pt")
        write_evaluations(SHIPPED, {**read_evaluations(SHIPPED), stage: evaluations_of(runs / nearest)})


def make_clip(stage):
    """A GIF in the console's own size: the first of the network's games after idle steps that it clears, or the last
    of 100 games."""
    from drawing import record  # here, because it needs IPython, and the tables do without it

    _, q_values, settings = m.load_network(stage=stage)
    for number in range(100):
        game = record(q_values, settings, "noop", number)
        if game.end == "cleared":
            break
    m.write_clip(m.TRAINED / f"mario_{stage}.gif", [picture[8:232, :, :3] for picture in game.pictures])


def evaluations_of(run, prefix=""):
    """{noise: evaluation} of a run's folder, also where one file holds them all; `prefix`: the level's, of a run of
    several levels."""
    if (together := run / "evaluations.json").exists():
        return next(iter(read_evaluations(together).values()))
    paths = {noise: run / f"evaluation-{prefix}{noise}.json" for noise in m.NOISES}
    return {noise: json.loads(path.read_text()) for noise, path in paths.items() if path.exists()}


def trainings(data=DATA, names="*"):
    """{name: (rows, {noise: evaluation})} of the trainings in that folder whose names fit the pattern."""
    found = {}
    for run in sorted(path.parent for path in data.glob(f"{names}/episodes.csv") if path.parent != TOGETHER.parent):
        found[run.name] = m.read_rows(run), evaluations_of(run)
    return found


def by_seed(mark):
    """After so many steps: the minutes, and of the last 100 games the mean return and the clears; a list by seed."""
    minutes, returns, clears = [], [], []
    for rows, _ in trainings(names="seed-*").values():
        last = last_hundred(rows, mark)
        minutes.append(last[-1]["seconds"] / 60)
        returns.append(fmean(row["return"] for row in last))
        clears.append(sum(row["cleared"] for row in last))
    return minutes, returns, clears


def way_table():
    """How far the training games of each seed came."""
    lines = ["| after | minutes | mean return of the last 100 games | cleared of them |", "| --- " * 4 + "|"]
    for mark in MARKS:
        cells = (" · ".join(f"{value:,.0f}" for value in values) for values in by_seed(mark))
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
        cells += [rate(found[noise]) if noise in found else "" for noise in m.NOISES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rate(found):
    """An evaluation in one cell. Without noise all games are the same, so there is no interval."""
    text = "{cleared} of {episodes}" if found["noise"] == "none" else "{cleared} of {episodes} ({:.0%} to {:.0%})"
    return text.format(*found["wilson_95"], **found)


def world_table():
    """A clip of each of these networks, and a table of rates with a column for each level."""
    found, together = read_evaluations(SHIPPED), read_evaluations(TOGETHER)
    clips = [f'<img src="results/mario_{stage}.gif" alt="World {stage}" width="24%">' for stage in found]
    lines = [["`--noise`", "what it does", *found], ["---"] * (2 + len(found))]
    for noise, words in MEANINGS.items():
        lines.append([f"`{noise}`", words, *(rate(evaluations[noise]) for evaluations in found.values())])
    shares = (f"{together[stage]['noop']['cleared']} of {together[stage]['noop']['episodes']}" for stage in found)
    lines.append(["`noop`", "the same, [one network](results/README.md#world-1) for all, 100,000 steps each", *shares])
    return "\n".join([" ".join(clips), "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def networks_table():
    """Rates of four networks, one for each level, beside those of one network for all."""
    both = {"one for each level": read_evaluations(SHIPPED), "one for all": read_evaluations(TOGETHER)}
    lines = [f"| `--noise` | networks | {' | '.join(ALL_FOUR.split(','))} |", "| --- " * 6 + "|"]
    for noise in m.NOISES:
        for name, found in both.items():
            cells = [rate(evaluations[noise]) for evaluations in found.values()]
            lines.append(f"| `{noise}` | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ends_table():
    """Where their lost games end."""
    lines = ["| level | noise | the four most frequent ends of lost games: how, and at which x (to x + 49) |",
             "| --- " * 3 + "|"]
    for stage, evaluations in read_evaluations(SHIPPED).items():
        for noise in NOISE_WORDS:
            places = Counter((end, x // 50 * 50) for end, x in evaluations[noise]["lost"]).most_common(4)
            said = "; ".join(f"{times} {end}, {x:,}" for (end, x), times in places)
            lines.append(f"| {stage} | `{noise}` | {said or 'none'} |")
    return "\n".join(lines)


def means():
    """One sentence: the share of games of 1-1 that are cleared, mean and range of the seeds, for each noise."""
    found = [evaluations for _, evaluations in trainings().values()]
    said = []
    for noise, words in NOISE_WORDS.items():
        shares = [100 * one[noise]["cleared"] / one[noise]["episodes"] for one in found]
        said.append(f"{fmean(shares):.0f} % ({min(shares):.0f} to {max(shares):.0f}) {words}")
    return (f"*Games of World 1-1 that are cleared, mean (lowest to highest) of {len(found)} trainings with "
            f"`--double`: {', '.join(said)}.*")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=Path, metavar="RUNS", help="print the commands, with their folders there")
    parser.add_argument("--seeds", type=int, default=5, help="of --commands (default: 5)")
    parser.add_argument("--collect", type=Path, metavar="RUNS", help="the folder of the finished runs")
    parser.add_argument("--stage", choices=[*m.STAGES, ALL_FOUR], default="1-1")
    args = parser.parse_args()
    if args.commands:
        return commands(args.commands, args.seeds, args.stage)
    if args.stage == ALL_FOUR:
        if args.collect:
            collect_all_four(args.collect / "seed-0")
        return m.plot_rewards([TOGETHER.parent], WORLD / "all-four.png")
    if args.collect:
        collect(args.collect, args.stage)
    first = args.stage == "1-1"
    data, names, picture = (DATA, "seed-*", "rewards") if first else (WORLD, f"*{args.stage}*", args.stage)
    drawn = [data / name for name in trainings(data, names) if name != "default-1-2"]  # longer-1-2 begins with it
    m.plot_rewards(drawn, data / f"{picture}.png")
    print(way_table() if first else "", rates_table(data), sep="\n\n")
    if args.collect:
        make_clip(args.stage)  # last: the notebooks' module changes how figures look


if __name__ == "__main__":
    main()
