"""Keeps README's tables true: they are made here, from the programs and from results/.

    python tests/readme.py           writes them between their marks in README.md
    python tests/readme.py --check   says whether they are up to date (a test calls this)
"""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grid_qlearning  # noqa: E402
import mario_ddqn  # noqa: E402

WHY = {  # the fourth column of the settings table
    "envs": "the emulator is the slowest part; threads use all cores",
    "train-every": "a CPU spends three quarters of its time on updates otherwise",
    "batch": "",
    "memory": "more variety; it costs 0.7 GB because each frame is kept once",
    "learn-start": "no learning from the first few seconds of play over and over",
    "gamma": "a jump decides over life and death some 15 steps later",
    "n-step": "a reward reaches the decision behind it in one update instead of five",
    "reward-scale": "brings the errors into the curved part of the Huber loss, which learns means; on its straight "
                    "part it learns medians, and a median does not mind a death of one in three",
    "priority": "more of the transitions that surprised: deaths and pipes are rare among the running",
    "lr": "",
    "copy": "updates; a fifth of the wait for news from the future",
    "eps-decay": "per update: the floor comes after thousands of updates, not after 389",
    "eps-min": "",
    "hold": "random actions are held for some steps: a high pipe needs the jump button held",
    "train-noise": "idle starts: no two episodes alike, so no trajectory can be learnt by heart",
    "precision": "bfloat16 on processors that have it saves a third of an update",
    "episodes": "",
    "eval-every": "the tutorial has no exams",
}



def flags(parser):
    lines = ["| flag | what it does |", "| --- | --- |"]
    for action in parser._actions:
        if action.help == "==SUPPRESS==" or "--help" in action.option_strings:
            continue
        name = action.option_strings[-1]
        values = action.metavar or ("" if action.nargs == 0 else action.dest.upper())
        if action.choices:
            values = "\\|".join(action.choices)
        if action.nargs == "?":
            values = f"[{values}]"
        values = values.replace("RUN|FILE", "RUN\\|FILE")
        helptext = (action.help % {"default": action.default}).replace("|", "\\|")
        lines.append(f"| `{name}{' ' + values if values else ''}` | {helptext} |".replace("\\|`", "|`"))
    return "\n".join(lines)


def settings():
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


BLOCKS = {"mario flags": lambda: flags(mario_ddqn.build_parser()),
          "grid flags": lambda: flags(grid_qlearning.make_parser()),
          "settings": settings, "throughput": throughput}


def updated(text):
    for name, make in BLOCKS.items():
        pattern = rf"(<!-- {name}: .*?-->\n).*?(\n<!-- end -->)"
        if not re.search(pattern, text, re.S):
            raise SystemExit(f"README.md has no block '{name}'")
        made = make()
        text = re.sub(pattern, lambda m, made=made: m[1] + made + m[2], text, count=1, flags=re.S)
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = updated(old)
    if "--check" in sys.argv:
        sys.exit(0 if old == new else "README.md is not up to date: python tests/readme.py")
    readme.write_text(new)
