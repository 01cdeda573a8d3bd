"""What the notebooks promise: they run from two folders, solutions included, they show the scripts' own definitions,
their stored pages are whole and tidy. And what the tool behind them (notebooks.py) promises, on made-up notebooks."""

import ast
import base64
import re
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

sys.path.insert(0, str(Path(__file__).resolve().parent))
import notebooks as tool
from notebooks import FOLDER, ROOT, SCRIPTS, Fault

GRID_NOTEBOOK, MARIO_NOTEBOOK = SCRIPTS
GRID = {"SEEDS": 3}  # parameters that make a run short
MARIO = {"TRAIN_STEPS": 600, "EPISODES": 2, "MAX_STEPS": 30, "UPDATES": 5, "LOOP_STEPS": 50, "LONGEST": 60, "TRIES": 1,
         "RUN": "runs/test-notebook"}  # not where a reader's own training may lie
SHOWN = {  # definitions that a reader must see and run
    GRID_NOTEBOOK: {"Grid", "Agent", "AgentDoubleQ", "AgentHasselt", "run_episodes", "train_agent",
                    "train_agent_doubleq", "greedy_path", "MOVES", "ARROWS"},
    MARIO_NOTEBOOK: {"MaxAndSkipEnv", "ProcessFrame84", "ImageToPyTorch", "BufferWrapper", "ScaledFloatFrame",
                     "make_env", "DQNSolver", "DQNAgent", "ReplayMemory"},
}
present = [name for name in SCRIPTS if (FOLDER / name).exists()]


def notebook(name):
    return tool.read(FOLDER / name)


# --- The notebooks -------------------------------------------------------------------------------
def test_both_are_there():
    assert present == list(SCRIPTS)


@pytest.mark.parametrize("name", present)
def test_the_stored_page_has_no_fault(name):
    assert tool.faults(FOLDER / name, ROOT / SCRIPTS[name]) == []


@pytest.mark.parametrize("name", present)
def test_definitions_are_the_scripts(name):
    """Written apart from the tool's own comparison: the same syntax tree, and nothing left out."""
    def trees(source):
        nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        return {node.name: ast.dump(node) for node in nodes}

    script = trees((ROOT / SCRIPTS[name]).read_text(encoding="utf-8"))
    shown = set()
    for cell in notebook(name).cells:
        if cell.cell_type == "code":
            for what, tree in trees(cell.source).items():
                assert what not in script or tree == script[what], what
            shown |= set(tool.definitions(cell.source))
    assert SHOWN[name] <= shown


@pytest.mark.parametrize("name", present)
def test_links_lead_somewhere_and_equations_are_closed(name):
    for cell in notebook(name).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(([^)#:]+)\)", cell.source):
                assert (FOLDER / link).exists() or link in SCRIPTS, link
            assert cell.source.count("$") % 2 == 0, cell.source
            assert cell.source.count("```") % 2 == 0, cell.source


@pytest.mark.parametrize("name", present)
def test_it_has_exercises_with_hidden_solutions(name):
    assert sum(bool(tool.solutions(cell)) for cell in notebook(name).cells) >= 3


def test_the_grid_prints_what_its_page_shows():
    """The default settings, from inside notebooks/. The solutions run too; each goes before the next stored cell."""
    stored = notebook(GRID_NOTEBOOK)
    ran = tool.execute(tool.variant(stored), FOLDER)
    outputs = {cell.id: tool.clean_outputs(cell.outputs) for cell in tool.code_cells(ran)}

    def seen(output):  # pictures are compared by their presence: their bytes change with matplotlib's version
        return output.output_type, output.get("text"), sorted(output.get("data", {}))

    for cell in tool.code_cells(stored):
        assert list(map(seen, outputs[cell.id])) == list(map(seen, cell.outputs)), cell.source


def test_the_grid_runs_from_the_root_without_its_solutions():
    tool.execute(tool.variant(notebook(GRID_NOTEBOOK), GRID, with_solutions=False), ROOT)


def test_the_grid_shows_the_comparison_that_lies_in_results():
    picture = base64.b64encode((ROOT / "results" / "grid_compare.png").read_bytes()).decode()
    shown = [output["data"].get("image/png", "") for cell in tool.code_cells(notebook(GRID_NOTEBOOK))
             for output in cell.outputs if "data" in output]
    assert picture in [text.replace("\n", "") for text in shown]


@pytest.mark.skipif(MARIO_NOTEBOOK not in present, reason="not written yet")
def test_mario_runs():
    tool.execute(tool.variant(notebook(MARIO_NOTEBOOK), MARIO), FOLDER)


# --- The tool, on made-up notebooks --------------------------------------------------------------
SCRIPT = 'LIMIT = 3  # why\n\n\n@property\ndef twice(x):\n    """Doc."""\n    return 2 * x  # fast\n'
SYNCED = '# shown first\n@property\ndef twice(x):\n    """Doc."""\n    return 2 * x  # fast\n\nprint(LIMIT)'


@pytest.fixture
def made(tmp_path):
    """A notebook without fault, its script, and a function that lists the faults of what became of it."""
    cells = [new_code_cell("N = 2", metadata={"tags": ["parameters"]}), new_code_cell("LIMIT = 3  # why"),
             new_code_cell(SYNCED, outputs=[new_output("stream", text="3\n")]), new_markdown_cell("What is N?"),
             new_code_cell("answer = ..."),
             new_markdown_cell("<details><summary>Solution</summary>\n\n```python\nanswer = N\n```\n\n</details>")]
    page = new_notebook(cells=cells)
    tool.clean(page)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def faults():
        tool.write(tmp_path / "page.ipynb", page)
        return "\n".join(tool.faults(tmp_path / "page.ipynb", script))

    assert faults() == ""
    return page, faults


def source(text):
    def change(page):
        page.cells[2].source = text
    return change


def output(text, name="stdout"):
    def change(page):
        page.cells[2].outputs.append(new_output("stream", text=text, name=name))
    return change


def solution(text):
    def change(page):
        page.cells[5].source = text
    return change


FAULTS = {
    "another definition": (source(SYNCED.replace("2 *", "3 *")), "sync"),
    "a definition without its decorator": (source(SYNCED.replace("@property\n", "")), "sync"),
    "another constant": (lambda page: page.cells[1].update(source="LIMIT = 4  # why"), "sync"),
    "not Python": (source("print(LIMIT"), "not valid Python"),
    "a magic": (source("%matplotlib inline"), "not valid Python"),
    "nothing stored": (lambda page: page.cells[2].update(outputs=[]), "no output stored"),
    "nothing stored in a loop": (lambda page: page.cells[4].update(source="for x in 1, 2:\n    print(x)"), "no output"),
    "nothing stored for a figure": (lambda page: page.cells[4].update(source="f, ax = plt.subplots()"), "no output"),
    "an error": (lambda page: page.cells[2].outputs.append(new_output("error", ename="ValueError")), "in ValueError"),
    "the repository's path": (output(str(ROOT / "x")), "an absolute path"),
    "a path in the text": (lambda page: page.cells[3].update(source="see /home/me/x"), "an absolute path"),
    "a temporary file": (output("saved as '/tmp/x.png'"), "an absolute path"),
    "an address": (output("<Agent object at 0x7f3a5c0d1e50>"), "an object's address"),
    "stderr": (output(" 50%|#####  |", "stderr"), "clean"),
    "counts": (lambda page: page.cells[2].update(execution_count=7), "clean"),
    "ids": (lambda page: page.cells[2].update(id="a1b2c3"), "clean"),
    "timing": (lambda page: page.cells[2].metadata.update(execution={"shell.execute_reply": "2024"}), "clean"),
    "a version": (lambda page: page.metadata.language_info.update(version="3.11.7"), "clean"),
    "no tag": (lambda page: page.cells[0].metadata.pop("tags"), "not tagged"),
    "a calculation among the parameters": (lambda page: page.cells[0].update(source="N = 2 * M"), "constants"),
    "no block in the solution": (solution("<details>\n```python\nanswer = 2\n```\n</details>"), "without a ```python"),
    "a block that is not Python": (solution("<details>\n\n```python\nanswer =\n```\n\n</details>"), "not valid Python"),
    "no stub": (lambda page: page.cells.pop(4), "without a stub"),
    "too large": (output("x" * tool.MAX_BYTES), "bytes"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found(made, name):
    page, faults = made
    change, message = FAULTS[name]
    change(page)
    assert message in faults()


def test_sync_copies_the_scripts_text_and_leaves_the_rest(made):
    page, faults = made
    page.cells[2].source = "# shown first\ndef twice(y):\n    return y + y\n\nprint(LIMIT)"
    tool.sync(page, SCRIPT)
    assert page.cells[2].source == SYNCED and faults() == ""
    page.cells[0].source = "LIMIT = 4"  # a parameter is the notebook's own
    tool.sync(page, SCRIPT)
    assert page.cells[0].source == "LIMIT = 4"


def test_clean_joins_prints_and_keeps_a_bars_last_state(made):
    page, _ = made
    page.cells[2].outputs = [new_output("stream", text="1\n"), new_output("stream", text="a\rb\rc\n2\n"),
                             new_output("stream", text="warning", name="stderr")]
    tool.clean(page)
    assert page.cells[2].outputs == [new_output("stream", text="1\nc\n2\n")]
    once = tool.text_of(page)
    tool.clean(page)
    assert tool.text_of(page) == once


def test_variant_overrides_after_the_parameters_and_puts_solutions_after_stubs(made):
    page, _ = made
    code = [cell.source for cell in tool.code_cells(tool.variant(page, {"N": 5}))]
    assert code == ["N = 2", "N = 5", "LIMIT = 3  # why", SYNCED, "answer = ...", "answer = N"]
    with pytest.raises(Fault, match="no such parameters: M"):
        tool.variant(page, {"M": 1})


def test_execute_says_which_cell_failed_and_the_tool_keeps_the_file(made, tmp_path, monkeypatch, capsys):
    page, _ = made
    page.cells[4].source = "raise ValueError('on purpose')"
    tool.write(tmp_path / GRID_NOTEBOOK, page)
    monkeypatch.setattr(tool, "FOLDER", tmp_path)
    before = (tmp_path / GRID_NOTEBOOK).read_bytes()
    assert tool.main(["run", "1"]) == 1
    message = capsys.readouterr().err
    assert GRID_NOTEBOOK in message and "on purpose" in message
    assert (tmp_path / GRID_NOTEBOOK).read_bytes() == before
    assert [path.name for path in tmp_path.glob(".*")] == []
