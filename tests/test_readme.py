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


def test_the_games_that_were_looked_into_are_those_that_the_evaluation_lost():
    found = json.loads((ROOT / "results" / "slips.json").read_text())
    evaluation = json.loads((ROOT / "results" / "evaluation-mario_1-1-epsilon.json").read_text())
    died = [(result["episode"], result["end_x"]) for result in evaluation["results"] if result["end"] == "died"]
    assert died == [(game["episode"], game["x"]) for game in found["lost"]]
    for game in found["maps"]:  # a choice is the best action, and is not among those that kill
        assert all(step["q"][step["choice"]] == max(step["q"]) and step["choice"] not in step["kills"]
                   for step in game["steps"])


def test_the_cost_of_a_deadly_place_is_probability_times_points_lost(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "benchmarks")
    steps = [{"x": 40, "q": [0, 10, 20, 30, 40], "choice": 4, "kills": []},
             {"x": 50, "q": [90, 60, 50, 100, 40], "choice": 3, "kills": [1, 4]}]
    game = {"episode": 0, "x": 60, "steps_before": 5, "chosen": 4, "played": 1}
    said = importlib.import_module("slips").sentences({
        "episodes": 9, "ways_tried": 48, "maps": [{"idle": 0, "cleared": True, "steps": steps}],
        "lost": [{"episode": 3, "x": 60}, {**game, "ways_out": 0}, {**game, "ways_out": 2, "played": 2}]})
    for part in ("Of 9 games", "loses 3 by a death", "In 2 of these", "in 1 of the 2", "In 1 that action",
                 "there are 1 such places among 2 steps", "0.02 deaths a game",  # 2 actions × 0.05 / 5
                 "kill 50 points less",                                          # (40 + 60) / 2
                 "others 27",                                                    # (40 + 30 + 20 + 10 + 10 + 50) / 6
                 "cost 1.0 points"):                                             # 0.05 / 5 × (40 + 60)
        assert part in said, part


def test_every_file_that_it_links_to_exists():
    for page in (ROOT / "README.md", ROOT / "results" / "trials" / "README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_no_mark_is_left_to_be_filled_in():
    assert not re.findall(r"%%|TODO|TBD|\(to come\)", (ROOT / "README.md").read_text())
