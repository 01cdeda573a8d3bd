"""Keeps README's tables true: they are made here, from the programs and from results/.

    python tests/readme.py           writes them between their marks in README.md
    python tests/readme.py --check   says whether they are up to date (a test calls this)
"""
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

import grid_qlearning  # noqa: E402
import mario_ddqn  # noqa: E402

WHY = {  # the fourth column of the settings table
    "envs": "0: 8, or one for each core where there are more, up to 32: the emulator is the slowest part, and threads "
            "use all cores",
    "train-every": "a CPU spends three quarters of its time on updates otherwise",
    "batch": "as in the tutorial",
    "memory": "more variety; it costs 0.7 GB because each frame is kept once",
    "learn-start": "no learning from the first few seconds of play over and over",
    "gamma": "a jump decides over life and death some 15 steps later",
    "n-step": "a reward reaches the decision behind it in one update instead of five",
    "reward-scale": "÷ 150 brings every error, even that of a death, which costs all that would have come after it, "
                    "into the curved part of the Huber loss, which learns means; on its straight part it learns "
                    "medians, and a median does not mind a death of one in three",
    "priority": "more of the transitions that surprised: deaths and pipes are rare among the running",
    "lr": "as in the tutorial",
    "lr-switch": "updates; then the learning rate becomes a fifth (`--lr-late 5e-05`): with large steps the greedy "
                 "policy never comes to rest",
    "copy": "updates; a fifth of the wait for news from the future",
    "eps-decay": "per update: the floor comes after thousands of updates, not after 390",
    "eps-min": "as in the tutorial",
    "hold": "random actions are held for some steps: a high pipe needs the jump button held, and sticky actions are "
            "survived more often ([what each ingredient brings](#what-each-ingredient-brings))",
    "train-noise": "idle starts: no two episodes alike, so no trajectory can be learnt by heart",
    "show-jump": "a white line above the picture while button A is down: Mario jumps only when it goes down anew, and "
                 "no frame shows where it is",
    "precision": "bfloat16 on processors that have it saves a third of an update",
    "episodes": "the limit that counts here is the next one",
    "steps": "about an hour on 4 cores",
    "eval-every": "the tutorial has no exams",
}


NOISES = tuple(mario_ddqn.NOISES)


def last_hundred(rows, mark):
    """The last 100 episodes that had ended after `mark` environment steps."""
    return [row for row in rows if row["env_steps"] <= mark][-100:]


def grid_comparison():
    """The table of results/grid_compare.json, then how far each double rule is from Q-learning, paired by seed."""
    rows = json.loads((ROOT / "results" / "grid_compare.json").read_text(encoding="utf-8"))
    lines = [grid_qlearning.comparison_table(rows), "", "The double rules less Q-learning, seed by seed:", "",
             "| world | learner | normalised reward | best path, points of % | value of the start |",
             "| --- | --- | --- | --- | --- |"]
    for row in rows:
        base = next(other for other in rows if other["world"] == row["world"])  # Q-learning comes first
        cells = [row["world"], row["learner"]]
        for key, scale, digits in (("reward", 1, 3), ("best_share", 100, 1), ("value", 1, 2)):
            gaps = [scale * (a - b) for a, b in zip(row[key], base[key], strict=True)]
            mean, half = grid_qlearning.mean_band(gaps)
            cells.append(f"{mean:+.{digits}f} ± {half:.{digits}f}")
        if row is not base:
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def flags(parser):
    lines = ["| flag | what it does |", "| --- | --- |"]
    for action in parser._actions:
        if "--help" in action.option_strings:
            continue
        name = action.option_strings[-1]
        values = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
        if action.choices:
            values = "\\|".join(action.choices)
        if action.nargs == "?":
            values = f"[{values}]"
        values = values.replace("RUN|FILE", "RUN\\|FILE")
        helptext = (action.help % {"default": action.default}).replace("|", "\\|")
        lines.append(f"| `{name}{' ' + values if values else ''}` | {helptext} |")
    return "\n".join(lines)


def settings():
    mario_ddqn.build_parser()  # fills DEFAULTS
    ours, theirs = mario_ddqn.DEFAULTS, {**mario_ddqn.DEFAULTS, **mario_ddqn.PRESETS["tutorial"]}
    lines = ["| setting | tutorial | here | why |", "| --- | --- | --- | --- |"]
    for flag, why in WHY.items():
        name = flag.replace("-", "_")
        lines.append(f"| `--{flag}` | {theirs[name]} | {ours[name]} | {why} |")
    return "\n".join(lines)


def throughput():
    """The table that throughput.py prints: a process of its own, which decides there what to import."""
    return subprocess.run([sys.executable, ROOT / "tests" / "benchmarks" / "throughput.py", "--markdown"],
                          check=True, capture_output=True, text=True).stdout.strip()


def table_of(benchmark, name):
    """The table that a benchmark makes from the summary of its runs."""
    return importlib.import_module(benchmark).table(json.loads((ROOT / "results" / name / f"{name}.json").read_text()))


def pythons():
    """One line per Python that throughput.py was run with: medians over the rounds."""
    found = [json.loads(path.read_text()) for path in (ROOT / "results").glob("throughput*.json")]
    lines = ["| Python | emulation alone, steps/s | " + " | ".join(
        f"{loop['label']}, {loop['train_every']} steps per update" for loop in found[0]["loops"][3:]) + " |",
        "| --- " * (2 + len(found[0]["loops"][3:])) + "|"]
    for result in sorted(found, key=lambda result: int(result["machine"]["python"].split(".")[1])):
        alone = median(one["alone"]["emulation emulation"]["count"] / one["alone"]["emulation emulation"]["seconds"]
                       for one in result["raw"])
        speeds = (f"{loop['steps_per_second']['median']:.0f}" for loop in result["loops"][3:])
        lines.append(f"| {result['machine']['python']} | {alone:.0f} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def seeds():
    """The runs of the default settings, one per seed: [(name, rows, exams, {noise: evaluation})]."""
    runs = []
    for folder in sorted((ROOT / "results" / "training").glob("seed-*")):
        evaluations = {noise: json.loads((folder / f"evaluation-best-{noise}.json").read_text()) for noise in NOISES}
        runs.append((folder.name.removeprefix("seed-"), mario_ddqn.read_rows(folder / "episodes.csv"),
                     json.loads((folder / "exams.json").read_text()), evaluations))
    return runs


def rate(evaluation):
    """Cleared of how many, and the 95 % interval; without noise it is one trajectory and no rate."""
    if "wilson_95" not in evaluation:
        return "cleared" if evaluation["cleared"] else f"stopped at x = {evaluation['results'][0]['end_x']}"
    low, high = evaluation["wilson_95"]
    return f"{evaluation['cleared']} of {evaluation['episodes']} ({low:.0%} to {high:.0%})"


def clear_rates():
    """One line per seed: when it first cleared the level, when the best exam came, and that network's clear rates."""
    lines = ["| seed | first clear | best exam | no noise | " + " | ".join(f"`{noise}`" for noise in NOISES[1:]) + " |",
             "| --- " * (len(NOISES) + 3) + "|"]
    for name, rows, exams, evaluations in seeds():
        first = next((row for row in rows if row["cleared"]), None)
        best = max(exams, key=lambda exam: mario_ddqn.score({**exam, "training_clears": fmean(
            row["cleared"] for row in last_hundred(rows, exam["steps"]))}))  # older exams do not hold that share
        cells = [name, f"{first['env_steps']:,} steps, {first['seconds'] / 60:.0f} min, episode {first['episode']}"
                 if first else "none",
                 f"{best['steps']:,} steps, {best['minutes']:.0f} min: {best['cleared']} of {best['episodes']}",
                 *(rate(evaluations[noise]) for noise in NOISES)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shipped():
    """The sentence under README's picture: the network in results/, from its evaluations."""
    rates = {noise: json.loads((ROOT / "results" / f"evaluation-mario_1-1-{noise}.json").read_text())
             for noise in NOISES}
    saved, settings = mario_ddqn.load_file(ROOT / "results" / "mario_1-1.pt")
    exam = json.loads(saved["exam"])
    words = {"noop": "after 0 to 30 idle steps", "epsilon": "with 5 % random actions", "sticky": "with sticky actions"}
    said = ", ".join(f"{rates[noise]['cleared']} of {rates[noise]['episodes']} episodes {words[noise]}"
                     for noise in NOISES[1:])
    alone = "clears" if rates["none"]["cleared"] else "does not clear"
    cores = {1: "one core", 2: "two cores"}.get(settings["threads"], f"{settings['threads']} cores")
    return (f"*Greedily, this network clears World 1-1 in {said}; without any noise it {alone} it. It was trained for "
            f"{exam['steps']:,} steps and {exam['minutes']:.0f} minutes on {cores} of an AMD EPYC (Zen 4), no GPU: "
            f"`python mario_ddqn.py --double --seed {settings['seed']}`. [All seeds](#how-often-mario-makes-it).*")


def slips():
    """What tests/benchmarks/slips.py found out about single random actions."""
    return importlib.import_module("slips").sentences(json.loads((ROOT / "results" / "slips.json").read_text()))


def survives():
    """What the kill harness and the endurance run measured."""
    results = ROOT / "results"
    kills = json.loads((results / "kill_resume.json").read_text())
    long = json.loads((results / "endurance" / "endurance.json").read_text())
    killed = (
        "`python tests/benchmarks/kill_resume.py --cost RUN` killed {trials} short real runs {kills} times with "
        "SIGKILL, {killed_while_writing_a_checkpoint} times while a checkpoint was being written: "
        "{unreadable_checkpoints} unreadable checkpoints, {lost_episodes} lost episodes, {duplicated_rows} duplicated "
        "rows, and {identical_to_the_unbroken_run} of {trials} identical to the unbroken run at the end "
        "([data](results/kill_resume.json)).")
    cost = (
        "A checkpoint of {frames:,} frames takes {seconds:.1f} s and {megabytes:.0f} MB (the frames alone are "
        "{megabytes_of_frames:.0f} MB before they are compressed): {share_of_the_time:.2%} of the time at one every "
        "{interval_minutes:g} minutes.")
    endured = (
        "`python tests/benchmarks/endurance.py` watched a training of {env_steps:,} steps. From when the replay memory "
        "was full to the end, the resident memory ({rss_mb_when_full:.0f} MB) changed by {growth:+.2%}, the threads "
        "from {threads_when_full} to {threads_at_the_end}, the open files from {files_when_full} to {files_at_the_end} "
        "([data](results/endurance/endurance.csv), [figure](results/endurance/endurance.png)).")
    return f"{killed.format(**kills)} {cost.format(**kills['cost'])}\n\n{endured.format(**long)}"


def tutorial_pair():
    """The tutorial's own settings with one network and with two, and the default ones, after so many episodes; then
    what the last networks of the first two do greedily."""
    folders = {"tutorial's settings, one network": "preset/single-0",
               "tutorial's settings, `--double`": "preset/tutorial-0",
               "default settings, `--double`": "training/seed-0"}
    runs = {name: mario_ddqn.read_rows(ROOT / "results" / folder / "episodes.csv") for name, folder in folders.items()}
    lines = ["| after | " + " | ".join(runs) + " |", "| --- " * (len(runs) + 1) + "|"]
    for mark in (100, 250, 500, 750, 1000):
        cells = [f"mean return {fmean(row['return'] for row in rows[mark - 100:mark]):,.0f}, "
                 f"{sum(row['cleared'] for row in rows[:mark])} clears so far ({rows[mark - 1]['env_steps']:,} steps, "
                 f"{rows[mark - 1]['seconds'] / 60:.0f} min)" for rows in runs.values()]
        lines.append(f"| {mark:,} episodes | {' | '.join(cells)} |")
    lines += ["", "What the last networks of the first two do greedily:", "",
              "| | no noise | `noop` | `epsilon` | Q, points (`noop`) | what came |", "| --- " * 6 + "|"]
    for name, folder in [*folders.items()][:2]:
        found = [json.loads((ROOT / "results" / folder / f"evaluation-{noise}.json").read_text())
                 for noise in ("none", "noop", "epsilon")]
        cells = [name, *(rate(one) for one in found), f"{found[1]['q']:.0f}", f"{found[1]['discounted_return']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def expect():
    """The way of the runs in results/training: what the last 100 episodes came to after so many steps."""
    runs = [rows for _, rows, _, _ in seeds()]
    lines = ["| after | mean return of the last 100 episodes | cleared of them |", "| --- | --- | --- |"]
    for mark in (10_000, 25_000, 50_000, 100_000, 150_000, 200_000, 300_000, 400_000, 500_000):
        last = [last_hundred(rows, mark) for rows in runs if mark <= rows[-1]["env_steps"] + 2_000]
        if len(last) == len(runs):
            returns = " · ".join(f"{fmean([row['return'] for row in part]):.0f}" for part in last)
            clears = " · ".join(str(sum(row["cleared"] for row in part)) for part in last)
            lines.append(f"| {mark:,} steps | {returns} | {clears} |")
    return "\n".join(lines)


def trials():
    """One line per trial: the mean return of the last 100 episodes after so many steps, from its CSV."""
    marks = (20_000, 40_000, 60_000, 100_000, 150_000, 200_000, 300_000, 500_000)
    lines = ["| run | change | expected | " + " | ".join(f"{mark // 1000}k steps" for mark in marks) + " | kept |",
             "| --- " * (len(marks) + 4) + "|"]
    for trial in json.loads((ROOT / "results" / "trials" / "trials.json").read_text()):
        rows = mario_ddqn.read_rows(ROOT / "results" / trial.get("csv", f"trials/{trial['run']}.csv"))
        cells = []
        for mark in marks:
            last = last_hundred(rows, mark)
            average = f"{fmean([row['return'] for row in last]):.0f} ({sum(row['cleared'] for row in last)})"
            cells.append(average if rows[-1]["env_steps"] >= 0.97 * mark else "–")
        cells = [trial["run"], trial["change"], trial["expected"], *cells, trial["kept"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def trial_rates():
    """What networks of trials cleared, from results/trials/evaluation-RUN[-STEPS]-NOISE.json."""
    found = {}
    for path in sorted((ROOT / "results" / "trials").glob("evaluation-*.json")):
        network, noise = path.stem.removeprefix("evaluation-").rsplit("-", 1)
        found.setdefault(network.replace("-", ", "), {})[noise] = rate(json.loads(path.read_text()))
    for name, _, _, evaluations in seeds():
        found[f"M{name}"] = {noise: rate(evaluation) for noise, evaluation in evaluations.items()}
    lines = ["| network of | " + " | ".join(f"`{noise}`" for noise in NOISES[1:]) + " |", "| --- " * len(NOISES) + "|"]
    for network in sorted(found):
        lines.append(f"| {network} | " + " | ".join(found[network].get(noise, "–") for noise in NOISES[1:]) + " |")
    return "\n".join(lines)


BLOCKS = {"mario flags": lambda: flags(mario_ddqn.build_parser()),
          "grid comparison": grid_comparison,
          "grid flags": lambda: flags(grid_qlearning.make_parser()),
          "settings": settings, "throughput": throughput, "trials": trials, "trial rates": trial_rates,
          "clear rates": clear_rates, "shipped": shipped, "slips": slips, "survives": survives,
          "expect": expect, "pythons": pythons, "double": lambda: table_of("double_or_not", "double"),
          "ablation": lambda: table_of("ablation", "ablation"), "tutorial pair": tutorial_pair}


def updated(text):
    """The text with every block between its marks (<!-- name: ... --> and <!-- end -->) made anew."""
    def make(match):
        return f"{match[1]}{BLOCKS[match[2]]()}\n\n<!-- end -->"
    return re.sub(r"(<!-- ([a-z ]+): [^>]*-->\n\n).*?<!-- end -->", make, text, flags=re.S)


def main(check):
    for path in (ROOT / "README.md", ROOT / "results" / "trials" / "README.md"):
        old = path.read_text()
        new = updated(old)
        if check and old != new:
            return f"{path.name} is not up to date: python tests/readme.py"
        if not check:
            path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
