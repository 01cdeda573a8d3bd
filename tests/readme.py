"""Keeps the tables of both READMEs true: they are made here, from the programs and from results/.

    python tests/readme.py           writes them between their marks in README.md and results/README.md
    python tests/readme.py --check   says whether they are up to date (a test calls this)
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]
import ablation  # noqa: E402
import clear_rates  # noqa: E402
import double_or_not  # noqa: E402
import grid_compare  # noqa: E402
import minutes  # noqa: E402
import throughput  # noqa: E402

import mario_ddqn as m  # noqa: E402


def read(path):
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def expect(table):
    """The table as it is, with what trainings came to after so many steps put into columns 2 to 5."""
    def fill(match):
        mark = int(match[1].replace(",", ""))
        minutes, returns, clears = clear_rates.by_seed(mark)
        columns = [[minutes.pop(clear_rates.TWO_CORES)], minutes, returns, clears]
        ends = [[f"{value:,.0f}" for value in (min(values), max(values))] for values in columns]
        return f"| {match[1]} | {' | '.join(low if low == high else f'{low} to {high}' for low, high in ends)} |"
    return re.sub(r"^\| ([\d,]+) \|[^|]*\|[^|]*\|[^|]*\|[^|]*\|", fill, table, flags=re.M)


def settings(table):
    """The table as it is, with the tutorial's and the default values put into the second and third column."""
    def fill(match):
        name = match[1].replace("-", "_")
        both = [str(value) for value in (m.PRESETS["tutorial"][name], getattr(m.Settings, name))]
        words = {"True": "yes", "False": "no", str(10**6): "no limit"}
        return f"| `--{match[1]}` | " + " | ".join(words.get(value, value) for value in both) + " |"
    return re.sub(r"^\| `--([a-z-]+)` \|[^|]*\|[^|]*\|", fill, table, flags=re.M)


def numbers(table):
    """The table as it is, with the number that a file has under a key put behind these two."""
    def fill(match):
        number = read(match[1])
        for key in match[2].split("."):
            number = number[key]
        return f"| `{match[1]}` | `{match[2]}` | {number} |"
    return re.sub(r"^\| `([\w/.]+)` \| `([\w.]+)` \|[^|]*\|", fill, table, flags=re.M)


def grid():
    rows = read("grid_compare.json")
    return (f"{grid_compare.comparison_table(rows)}\n\nThe double rules less Q-learning, seed by seed:\n\n"
            f"{grid_compare.differences_table(rows)}")


BLOCKS = {"settings": settings, "numbers": numbers, "grid": lambda _: grid(),
          "expect": expect, "world": lambda _: clear_rates.world_table(),
          "means": lambda _: f"{clear_rates.means()}\n\n{minutes.sentence(read('training/minutes.json'))}",
          "training": lambda _: f"{clear_rates.way_table()}\n\n{clear_rates.rates_table()}",
          "levels": lambda _: f"{clear_rates.rates_table(clear_rates.WORLD)}\n\n{clear_rates.ends_table()}\n\n"
                            f"{clear_rates.networks_table()}",
          "preset": lambda _: clear_rates.rates_table(RESULTS / "preset"),
          "throughput": lambda _: throughput.table(read("throughput.json")),
          "double": lambda _: double_or_not.table(read("double/double.json")),
          "ablation": lambda _: ablation.table(read("ablation/ablation.json"))}


def main(check):
    """Every block between its marks (<!-- name: ... --> and <!-- end -->) is made anew, or compared."""
    made = set()  # the blocks that were found

    def make(match):
        made.add(match[2])
        return f"{match[1]}\n{BLOCKS[match[2]](match[3].strip())}\n\n{match[4]}"
    for path in (ROOT / "README.md", RESULTS / "README.md"):
        old = path.read_text(encoding="utf-8")
        new = re.sub(r"(<!-- ([a-z]+): [^>]*-->\n)(.*?)(<!-- end -->)", make, old, flags=re.S)
        if check and new != old:
            return f"{path.relative_to(ROOT)} is not up to date: python tests/readme.py"
        if not check:
            path.write_text(new, encoding="utf-8")
    if made != set(BLOCKS):
        return f"no marks for: {', '.join(sorted(set(BLOCKS) - made))}"


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
