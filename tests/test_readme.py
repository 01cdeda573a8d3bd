"""What README says is what the programs do: its tables are made from them, its links lead somewhere."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_tables_are_up_to_date():
    result = subprocess.run([sys.executable, ROOT / "tests" / "readme.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_file_that_it_links_to_exists():
    for page in (ROOT / "README.md", ROOT / "results" / "trials" / "README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_no_mark_is_left_to_be_filled_in():
    assert not re.findall(r"%%|TODO|TBD|\(to come\)", (ROOT / "README.md").read_text())
