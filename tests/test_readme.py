"""What the READMEs say is what the programs do: tables are made from them, links lead somewhere, commands are known."""
import contextlib
import importlib
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, m

import grid_qlearning

PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "results" / "README.md")}


def test_the_tables_are_up_to_date():
    result = subprocess.run([sys.executable, ROOT / "tests" / "readme.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("benchmark, file", [("double_or_not", "double/double"), ("ablation", "ablation/ablation")])
def test_a_benchmarks_summary_follows_from_its_runs(benchmark, file):
    module, found = importlib.import_module(benchmark), json.loads((ROOT / "results" / f"{file}.json").read_text())
    assert len(found) >= 5
    for run in found:
        columns = {name: run[name] for name in ("env_steps", "return", "cleared")}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        assert run == run | module.summary(rows, module.MARKS)


def test_the_return_that_followed_a_step_is_discounted_from_there_on():
    discounted = importlib.import_module("double_or_not").discounted
    assert discounted([7, 8, 9], [1, 2, 4], 0.5) == [(7, 1 + 0.5 * (2 + 0.5 * 4)), (8, 2 + 0.5 * 4), (9, 4)]


def test_every_file_and_every_heading_that_is_linked_to_exists():
    for page, text in PAGES.items():
        assert not re.findall(r"%%|TODO|TBD|\(to come\)", text), f"{page.name} has a mark that is left to be filled in"
        for file, anchor in re.findall(r'(?:\]\(|<img src=")(?!https?:)([^)#"]*)(?:#([^)]*))?[)"]', text):
            target = page.parent / file if file else page
            assert target.exists(), f"{page.name} links to {file}"
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.M) if anchor else []
            anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{page.name} links to #{anchor}"


@pytest.mark.parametrize("line", re.findall(r"^\.venv/bin/python (\S+\.py.*)", PAGES[ROOT / "README.md"], re.M))
def test_the_parser_knows_every_flag_of_a_command(line):
    program, *flags = line.split("#")[0].split()
    parser = {"mario_ddqn.py": m.build_parser, "grid_qlearning.py": grid_qlearning.make_parser}[program]()
    with contextlib.suppress(SystemExit if flags == ["--help"] else ()):
        parser.parse_args(flags)
