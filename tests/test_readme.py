"""What README says is what the programs do: its tables are made from them, its links lead somewhere."""
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_tables_are_up_to_date():
    result = subprocess.run([sys.executable, ROOT / "tests" / "readme.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("benchmark, summary", [("double_or_not", "double/double.json"),
                                                ("ablation", "ablation/ablation.json")])
def test_a_benchmarks_summary_follows_from_its_runs(benchmark, summary, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    found = importlib.import_module(benchmark).measure()
    assert len(found) >= 5 and json.loads((ROOT / "results" / summary).read_text()) == found


def test_every_file_that_it_links_to_exists():
    for page in (ROOT / "README.md", ROOT / "results" / "trials" / "README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_no_mark_is_left_to_be_filled_in():
    assert not re.findall(r"%%|TODO|TBD|\(to come\)", (ROOT / "README.md").read_text())
