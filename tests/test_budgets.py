"""Both programs stay short: their budgets may only fall (mario_ddqn.py to 880 lines, 50 KB). `pytest -s` shows them."""
import ast
import dataclasses
import re

import nbformat
from conftest import ROOT, m

from notebooks import FOLDER, MAX_LINES, SCRIPTS, code_cells

TEXT = (ROOT / "mario_ddqn.py").read_text(encoding="utf-8")
SECTIONS = ["Settings", "Environment", "Network", "Agent", "Training loop", "Evaluation and pictures", "Command line"]


def lines_of(*paths):
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def check(**budgets):
    for name, (found, most) in budgets.items():
        print(f"{name.replace('_', ' '):32} {found:6} of {most}")
    assert [name for name, (found, most) in budgets.items() if found > most] == []


def test_the_program_keeps_its_budget():
    functions = [node for node in ast.walk(ast.parse(TEXT)) if isinstance(node, ast.FunctionDef)]
    settings = len(dataclasses.fields(m.Settings))
    check(lines=(len(TEXT.splitlines()), 1053), bytes=(len(TEXT.encode()), 58_920),
          longest_function=(max(node.end_lineno - node.lineno + 1 for node in functions), 75),
          lines_over_110_characters=(sum(len(line) > 110 for line in TEXT.splitlines()), 60), settings=(settings, 28),
          other_flags=(len(m.build_parser()._actions) - 1 - settings, 8))  # -1: --help


def test_its_sections_come_in_their_order():
    assert re.findall(r"^# ===== \d\. ([^.]*)\.", TEXT, re.M) == SECTIONS


def test_the_grid_the_pages_the_tests_and_the_tools_keep_theirs():
    tests = ROOT / "tests"
    tools = [path for path in tests.glob("*.py") if not path.name.startswith("test_") and path.name != "conftest.py"]
    cells = [cell for name in SCRIPTS for cell in code_cells(nbformat.read(FOLDER / name, 4))]
    check(longest_cell=(max(len(cell.source.splitlines()) for cell in cells), MAX_LINES),
          grid=(lines_of(ROOT / "grid_qlearning.py"), 330), tests=(lines_of(*tests.glob("test_*.py")), 1977),
          tools=(lines_of(*tools), 300), readme=(lines_of(ROOT / "README.md"), 220),
          readme_words=(len((ROOT / "README.md").read_text(encoding="utf-8").split()), 2200))
