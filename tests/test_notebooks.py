"""What the notebooks promise: they run from two folders, solutions included, they show the scripts' own definitions,
their stored pages are whole and tidy. And what the tool behind them (notebooks.py) promises, on a made-up one."""
import base64
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import notebooks as tool
from notebooks import FOLDER, ROOT, SCRIPTS

GRID, MARIO = SCRIPTS
PAGES = {name: nbformat.read(FOLDER / name, 4) for name in SCRIPTS}
SHORT = {"TRAIN_STEPS": 600, "EPISODES": 2, "MAX_STEPS": 40, "UPDATES": 5}
SHOWN = {  # a reader must see and run these; of a class with "*" every method but those of checkpoints
    GRID: "Grid* Agent* AgentDoubleQ* AgentHasselt* run_episodes train_agent train_agent_doubleq greedy_path MOVES",
    MARIO: "MaxAndSkipEnv* ProcessFrame84* ImageToPyTorch* BufferWrapper* ScaledFloatFrame* make_env DQNSolver* "
           "ReplayMemory* DQNAgent* Episode* play_episode wilson"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_definition_is_the_scripts_wherever_it_stands(name):
    script, shown = tool.definitions((ROOT / SCRIPTS[name]).read_text(encoding="utf-8")), set()
    for cell in tool.code_cells(PAGES[name]):
        shown |= set(tool.definitions(cell.source))
    assert not {what for what in shown - set(script) if what.split(".")[0] in script}, "methods that it lacks"
    for what in SHOWN[name].split():
        parts = {method for method in script if method.startswith(f"{what[:-1]}.") and "state_dict" not in method}
        assert {what.rstrip("*"), *(parts if "*" in what else [])} <= shown, what


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_stored_page_has_no_fault_no_dead_link_and_exercises_with_hidden_solutions(name):
    assert tool.faults(FOLDER / name, ROOT / SCRIPTS[name]) == []
    cells = [cell for cell in PAGES[name].cells if cell.cell_type == "markdown"]
    for cell in cells:
        assert [link for link in re.findall(r"\]\(([^)#:]+)\)", cell.source) if not (FOLDER / link).exists()] == []
        assert cell.source.count("$") % 2 == cell.source.count("```") % 2 == 0, cell.source
    assert sum(bool(tool.solutions(cell)) for cell in cells) >= 3


def test_the_grid_prints_what_its_page_shows_and_runs_from_the_root():
    def seen(notebook):  # pictures are compared by their presence: their bytes change with matplotlib's version
        tool.clean(notebook)
        return [(output.output_type, output.get("text"), sorted(output.get("data", {})))
                for cell in tool.code_cells(notebook) for output in cell.outputs]

    ran = tool.execute(tool.variant(PAGES[GRID]), FOLDER)
    ran.cells = [cell for cell in ran.cells if cell.id.startswith("cell-")]  # without those of the solutions
    assert seen(ran) == seen(PAGES[GRID])
    tool.execute(tool.variant(PAGES[GRID], {"SEEDS": 3}, with_solutions=False), ROOT)
    picture = base64.b64encode((ROOT / "results" / "grid_compare.png").read_bytes()).decode()
    assert picture in str(PAGES[GRID]).replace("\\n", "")


def test_mario_runs(tmp_path):
    tool.execute(tool.variant(PAGES[MARIO], {**SHORT, "RUN": str(tmp_path / "run")}), FOLDER)
    assert (tmp_path / "run-1" / "network.pt").exists()


FIRST = 'class A:\n    """Doc."""\n    x = 3\n\n    def f(self):\n        return 1  # one'
METHOD = "    @property\n    def g(self):\n        return 2\n"
SCRIPT, SECOND = f"{FIRST}\n\n{METHOD}", f"class A(A):  # continued\n{METHOD}\nprint(A().g)"
SOLUTION = "<details><summary>Solution</summary>\n\n```python\nanswer = N\n```\n\n</details>"


def make(a="N = 2", b=FIRST, c=SECOND, d="answer = ...", tags=("parameters",), kind="stream", **more):
    """A notebook without fault, unless something else is given."""
    made = new_notebook(cells=[*map(new_code_cell, (a, b, c, d)), new_markdown_cell(SOLUTION)])
    tool.clean(made)
    more = {"text": "2\n", **more} if kind == "stream" else more
    made.cells[0].metadata.tags, made.cells[2].outputs = list(tags), [new_output(kind, **more)]
    return made


@pytest.mark.parametrize("message, change", [
    ("", {}), ("sync", {"b": FIRST.replace("= 3", "= 4")}), ("sync", {"c": SECOND.replace("@property", "@x")}),
    ("sync", {"b": FIRST[:-5]}), ("invalid syntax", {"d": "%matplotlib inline"}), ("no output", {"d": "show(1)"}),
    ("41 lines", {"d": "x = 1\n" * 40 + "x"}), ("error", {"kind": "error"}), ("not tagged", {"a": "N = 2 * M"}),
    ("not tagged", {"tags": ()}), ("absolute path", {"text": f"saved {ROOT / 'x'}"}), ("clean", {"name": "stderr"}),
    ("address", {"text": "<Agent object at 0x7f3a5c0d1e50>"}), ("too large", {"text": "x" * 3_000_000})])
def test_each_fault_is_found(message, change, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    nbformat.write(make(**change), tmp_path / "page.ipynb")
    found = tool.faults(tmp_path / "page.ipynb", tmp_path / "script.py")
    assert message in str(found) and bool(message) == bool(found)


def test_sync_puts_the_scripts_text_into_its_place_and_variant_the_solutions():
    made = make(b="# first\n" + FIRST.replace("return 1", "return 5"), c=SECOND.replace("return 2", "pass"))
    tool.sync(made, SCRIPT)
    code = [cell.source for cell in tool.code_cells(tool.variant(made, {"N": 5}))]
    assert code == ["N = 2", "N = 5", "# first\n" + FIRST, SECOND, "answer = ...", "answer = N"]


def test_a_cell_that_fails_is_named_and_the_file_stays(tmp_path, monkeypatch):
    (tmp_path / GRID).write_text(tool.clean(make(b="", c="raise ValueError('on purpose')")))
    before = (tmp_path / GRID).read_bytes()
    monkeypatch.setattr(tool, "FOLDER", tmp_path)
    assert "on purpose" in tool.main(["run", "1"])
    assert (tmp_path / GRID).read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [GRID]
