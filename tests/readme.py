"""Keeps README's tables true: they are made here, from the programs and from results/.

    python tests/readme.py           writes them between their marks in README.md
    python tests/readme.py --check   says whether they are up to date (a test calls this)
"""
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grid_qlearning  # noqa: E402
import mario_ddqn  # noqa: E402

WHY = {  # the fourth column of the settings table
    "envs": "the emulator is the slowest part; threads use all cores",
    "train-every": "a CPU spends three quarters of its time on updates otherwise",
    "batch": "as in the tutorial",
    "memory": "more variety; it costs 0.7 GB because each frame is kept once",
    "learn-start": "no learning from the first few seconds of play over and over",
    "gamma": "a jump decides over life and death some 15 steps later",
    "n-step": "a reward reaches the decision behind it in one update instead of five",
    "reward-scale": "brings the errors into the curved part of the Huber loss, which learns means; on its straight "
                    "part it learns medians, and a median does not mind a death of one in three",
    "priority": "more of the transitions that surprised: deaths and pipes are rare among the running",
    "lr": "as in the tutorial",
    "copy": "updates; a fifth of the wait for news from the future",
    "eps-decay": "per update: the floor comes after thousands of updates, not after 390",
    "eps-min": "as in the tutorial",
    "hold": "random actions are held for some steps: a high pipe needs the jump button held",
    "train-noise": "idle starts: no two episodes alike, so no trajectory can be learnt by heart",
    "precision": "bfloat16 on processors that have it saves a third of an update",
    "episodes": "the limit that counts here is the next one",
    "steps": "about an hour on 4 cores",
    "eval-every": "the tutorial has no exams",
}


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
    script = ROOT / "tests" / "benchmarks" / "throughput.py"
    return subprocess.run([sys.executable, script, "--markdown", "--from", ROOT / "results" / "throughput.json"],
                          check=True, capture_output=True, text=True).stdout.strip()


def clear_rates():
    """The evaluations of the network in results/, and the run that it comes from."""
    results = ROOT / "results"
    lines = ["| noise | episodes | cleared | 95 % interval | mean furthest x |", "| --- | --- | --- | --- | --- |"]
    for noise in ("none", "noop", "epsilon", "sticky"):
        one = json.loads((results / f"evaluation-mario_1-1-{noise}.json").read_text())
        low, high = one.get("wilson_95", (None, None))
        interval = f"{low:.0%} to {high:.0%}" if low is not None else "one trajectory, not a rate"
        cells = [f"`{noise}`", one["episodes"], one["cleared"], interval, round(one["mean_furthest_x"])]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    rows = mario_ddqn.read_rows(results / "training" / "episodes.csv")
    exams = json.loads((results / "training" / "exams.json").read_text())
    best = max(exams, key=lambda exam: exam["score"])
    first = next((row for row in rows if row["cleared"]), None)
    clear = "it never cleared the level" if not first else (
        f"its first clear was episode {first['episode']}, after {first['env_steps']:,} steps and "
        f"{first['seconds'] / 60:.0f} minutes")
    lines += ["", f"The run: {len(rows):,} episodes, {rows[-1]['env_steps']:,} steps, {rows[-1]['seconds'] / 60:.0f} "
              f"minutes; {clear}; the exam that made this network the best came after {best['steps']:,} steps and "
              f"{best['minutes']:.0f} minutes, with {best['cleared']} of {best['episodes']} cleared."]
    return "\n".join(lines)


def expect():
    """The way of the run in results/training: what the last 100 episodes came to after so many steps."""
    rows = mario_ddqn.read_rows(ROOT / "results" / "training" / "episodes.csv")
    lines = ["| after | mean return of the last 100 episodes | cleared of them |", "| --- | --- | --- |"]
    for mark in (10_000, 25_000, 50_000, 100_000, 150_000, 200_000, 300_000, 400_000, 500_000):
        if mark <= rows[-1]["env_steps"] + 2_000:
            last = last_hundred(rows, mark)
            average = fmean([row["return"] for row in last])
            lines.append(f"| {mark:,} steps | {average:.0f} | {sum(row['cleared'] for row in last)} |")
    return "\n".join(lines)


def trials():
    """One line per trial: the mean return of the last 100 episodes after so many steps, from its CSV."""
    marks = (20_000, 30_000, 40_000, 60_000)
    lines = ["| run | change | expected | " + " | ".join(f"{mark // 1000}k steps" for mark in marks) + " | kept |",
             "| --- " * (len(marks) + 4) + "|"]
    for trial in json.loads((ROOT / "results" / "trials" / "trials.json").read_text()):
        rows = mario_ddqn.read_rows(ROOT / "results" / "trials" / f"{trial['run']}.csv")
        cells = []
        for mark in marks:
            average = fmean([row["return"] for row in last_hundred(rows, mark)])
            cells.append(f"{average:.0f}" if rows[-1]["env_steps"] >= 0.97 * mark else "–")
        cells = [trial["run"], trial["change"], trial["expected"], *cells, trial["kept"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


BLOCKS = {"mario flags": lambda: flags(mario_ddqn.build_parser()),
          "grid comparison": grid_comparison,
          "grid flags": lambda: flags(grid_qlearning.make_parser()),
          "settings": settings, "throughput": throughput, "trials": trials,
          "clear rates": clear_rates, "expect": expect}


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
