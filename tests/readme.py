"""Keeps the tables of both READMEs true: they are made here, from the programs and from results/.

    python tests/readme.py           writes them between their marks in README.md and results/README.md
    python tests/readme.py --check   says whether they are up to date (a test calls this)
"""
import importlib
import json
import re
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]
from double_or_not import last_hundred  # noqa: E402
from grid_compare import comparison_table, mean_band  # noqa: E402

import mario_ddqn as m  # noqa: E402

NOISES = {"noop": "after 0 to 30 idle steps", "epsilon": "with 5 % random actions", "sticky": "with sticky actions"}


def read(*path):
    return json.loads(RESULTS.joinpath(*path).read_text(encoding="utf-8"))


def markdown(*rows):
    first, *others = (f"| {' | '.join(map(str, row))} |" for row in rows)
    return "\n".join([first, "| --- " * len(rows[0]) + "|", *others])


def rate(found):
    if found["episodes"] == 1:  # without noise it is one trajectory and no rate
        return "cleared" if found["cleared"] else "not cleared"
    return "{} of {} ({:.0%} to {:.0%})".format(found["cleared"], found["episodes"], *found["wilson_95"])


def grid_comparison():
    rows = read("grid_compare.json")
    lines = [("world", "learner", "normalised reward", "best path, points of %", "value of the start")]
    for row in rows:
        base, cells = next(other for other in rows if other["world"] == row["world"]), []  # Q-learning is the first
        for key, scale, digits in (("reward", 1, 3), ("best_share", 100, 1), ("value", 1, 2)):
            mean, half = mean_band([scale * (a - b) for a, b in zip(row[key], base[key], strict=True)])
            cells.append(f"{mean:+.{digits}f} ± {half:.{digits}f}")
        lines += [(row["world"], row["learner"], *cells)] if row is not base else []
    return f"{comparison_table(rows)}\n\nThe double rules less Q-learning, seed by seed:\n\n{markdown(*lines)}"


def settings(table):
    """The table as it is, with the tutorial's and the default values put into the second and third column."""
    def values(match):
        name = match[1].replace("-", "_")
        both = [str(value) for value in (m.PRESETS["tutorial"][name], getattr(m.Settings, name))]
        words = {"True": "yes", "False": "no", str(10**6): "no limit"}
        return f"| `--{match[1]}` | " + " | ".join(words.get(value, value) for value in both) + " |"
    return re.sub(r"^\| `--([a-z-]+)` \|[^|]*\|[^|]*\|", values, table, flags=re.M)


def training():
    """Two tables: what the training games of each seed came to, and what their networks clear."""
    runs = [m.read_rows(folder) for folder in sorted((RESULTS / "training").glob("seed-*"))]
    way = [("after", "mean return of the last 100 episodes", "cleared of them")]
    for mark in (25_000, 50_000, 100_000, 200_000, 500_000):
        parts = [last_hundred(rows, mark) for rows in runs]
        way.append((f"{mark:,} steps", " · ".join(f"{fmean(row['return'] for row in part):,.0f}" for part in parts),
                    " · ".join(f"{sum(row['cleared'] for row in part):.0f}" for part in parts)))
    rates = [("seed", "first clear", "no noise", *(f"`{noise}`" for noise in NOISES))]
    for seed, rows in enumerate(runs):
        first = next(row for row in rows if row["cleared"])
        rates.append((seed, f"{first['env_steps']:,.0f} steps, {first['seconds'] / 60:.0f} min", *(
            rate(read("training", f"seed-{seed}", f"evaluation-best-{noise}.json")) for noise in ("none", *NOISES))))
    return f"{markdown(*way)}\n\n{markdown(*rates)}"


def shipped():
    found = {noise: read(f"evaluation-mario_1-1-{noise}.json") for noise in ("none", *NOISES)}
    said = ", ".join("{cleared} of {episodes} games ".format(**found[noise]) + words for noise, words in NOISES.items())
    return (f"*Greedily, the trained network that comes with the program clears World 1-1 in {said}; without noise it "
            f"{'clears' if found['none']['cleared'] else 'does not clear'} it.*")


def table_of(benchmark, *path):
    """The table that a benchmark makes from the summary of its runs."""
    measured = RESULTS.joinpath(*path).exists()
    return importlib.import_module(benchmark).table(read(*path)) if measured else "(Not measured yet.)"


BLOCKS = {"grid comparison": lambda _: grid_comparison(), "settings": settings, "training": lambda _: training(),
          "shipped": lambda _: shipped(), "throughput": lambda _: table_of("throughput", "throughput.json"),
          "double": lambda _: table_of("double_or_not", "double", "double.json"),
          "ablation": lambda _: table_of("ablation", "ablation", "ablation.json")}


def main(check):
    """Every block between its marks (<!-- name: ... --> and <!-- end -->) is made anew, or compared."""
    def make(match):
        return f"{match[1]}{BLOCKS[match[2]](match[3])}{match[4]}" if match[2] in BLOCKS else match[0]
    for path in (ROOT / "README.md", RESULTS / "README.md"):
        old = path.read_text(encoding="utf-8")
        new = re.sub(r"(<!-- ([a-z ]+): [^>]*-->\n\n)(.*?)(\n\n<!-- end -->)", make, old, flags=re.S)
        if check and new != old:
            return f"{path.relative_to(ROOT)} is not up to date: python tests/readme.py"
        if not check:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
