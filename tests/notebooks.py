"""Keeps the notebooks true and tidy. NAME is the start of a file name (1, 2_mario); without it, all of them.

    python tests/notebooks.py sync  [NAME ...]   copy the scripts' definitions into the notebooks' cells
    python tests/notebooks.py run   [NAME ...]   sync, run on a fresh kernel, clean, save the outputs
    python tests/notebooks.py clean [NAME ...]   take the noise of a run out of them
    python tests/notebooks.py check [NAME ...]   list what is wrong with them (the tests call this)

A notebook's first code cell is tagged "parameters" and holds constants only; `variant` overrides them.
An exercise is a question (Markdown), a stub that runs (code), and a solution (Markdown): ```python blocks between
<details> and </details>. `variant` puts these blocks after the stub as cells, so that the tests run them too.
"""
import argparse
import ast
import copy
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from grid_qlearning import save_whole  # noqa: E402

FOLDER = ROOT / "notebooks"
SCRIPTS = {"1_grid_qlearning.ipynb": "grid_qlearning.py", "2_mario_ddqn.ipynb": "mario_ddqn.py"}
MAX_BYTES = 3_000_000
# Some machine's own folders, and this machine's: neither belongs into a page that others read.
PLACES = {"/home", "/root", "/Users", "/tmp", "/var/folders", "/opt", "/usr", "/mnt"}
PLACES |= {str(place) for place in (ROOT, Path.home(), tempfile.gettempdir(), sys.prefix, sys.base_prefix)
           if str(place) != "/"}
ABSOLUTE = re.compile(rf"(?<![\w.~/])(?:{'|'.join(map(re.escape, sorted(PLACES)))})(?:/[\w.@+-]+)*(?![\w-])")
ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]{6,}")  # <Agent object at 0x7f...>: another one in every run


class Fault(Exception):
    """Something that must not be kept in a notebook."""


# --- Definitions ---------------------------------------------------------------------------------
def definitions(source):
    """{name: (first line, line after the last, node)} of the functions, classes and CONSTANTS at the top level."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = first - 1, node.end_lineno, node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            found[node.targets[0].id] = node.lineno - 1, node.end_lineno, node
    return found


def sync(notebook, script_source):
    """Put the script's text in place of every definition of the same name, outside the parameters' cell."""
    script, script_lines = definitions(script_source), script_source.split("\n")
    for cell in code_cells(notebook):
        if "parameters" in cell.metadata.get("tags", []):
            continue
        lines = cell.source.split("\n")
        for name, (first, last, _) in reversed(definitions(cell.source).items()):  # from below: line numbers hold
            if name in script:
                lines[first:last] = script_lines[slice(*script[name][:2])]
        cell.source = "\n".join(lines)


# --- Cleaning ------------------------------------------------------------------------------------
def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def clean_outputs(outputs):
    """Without stderr (progress bars, warnings) and widgets; what one cell prints in turn becomes one text."""
    kept = []
    for output in outputs:
        if output.get("name") == "stderr" or "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":  # a line written over itself keeps its last state
            output.text = re.sub(r"^.*\r(?!\n)", "", output.text, flags=re.M)
    return kept


def texts(notebook):
    """(where, text) of everything that a reader sees, pictures aside."""
    for number, cell in enumerate(notebook.cells):
        yield f"cell {number}", cell.source
        for output in cell.get("outputs", []):
            yield f"output of cell {number}", output.get("text", "")
            yield f"output of cell {number}", "\n".join(output.get("traceback", []))
            for kind, data in output.get("data", {}).items():
                if not kind.startswith("image/") or kind == "image/svg+xml":
                    yield f"output of cell {number}", str(data)


def clean(notebook):
    """Take out what differs from run to run. Fault: an absolute path or an object's address."""
    language = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": language})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in ("tags",) if cell.metadata.get(key)})
        cell.pop("attachments", None)
        cell.source = cell.source.strip("\n")
    for count, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = count
        cell.outputs = clean_outputs(cell.outputs)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
    for where, text in texts(notebook):
        for pattern, what in ((ABSOLUTE, "an absolute path"), (ADDRESS, "an object's address")):
            if match := pattern.search(text):
                raise Fault(f"{where} holds {what}: {match[0]}")


# --- Files ---------------------------------------------------------------------------------------
def read(path):
    return nbformat.read(path, as_version=4)


def text_of(notebook):
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def write(path, notebook):
    """Whole or not at all."""
    save_whole(path, lambda unfinished: unfinished.write_text(text_of(notebook), encoding="utf-8"))


# --- Running -------------------------------------------------------------------------------------
def parameters(notebook):
    """{name: value} of the first code cell. Fault: it is not tagged, or holds more than constants."""
    cell = code_cells(notebook)[0]
    if cell.metadata.get("tags") != ["parameters"]:
        raise Fault('the first code cell is not tagged "parameters"')
    try:
        return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    except (AttributeError, ValueError):
        raise Fault("the parameters' cell holds more than constants") from None


def solutions(cell):
    """The Python blocks between <details> and </details>."""
    hidden = re.findall(r"<details>.*?</details>", cell.source, re.S) if cell.cell_type == "markdown" else []
    return [block for part in hidden for block in re.findall(r"\n\n```python\n(.*?)\n```", part, re.S)]


def variant(notebook, overrides=(), with_solutions=True):
    """A copy with other parameters, and with the solutions as cells."""
    made = copy.deepcopy(notebook)
    if unknown := set(dict(overrides)) - set(parameters(notebook)):
        raise Fault(f"no such parameters: {', '.join(sorted(unknown))}")
    cells = []
    for cell in made.cells:
        cells.append(cell)
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            cells.append(new_code_cell("\n".join(f"{name} = {value!r}" for name, value in dict(overrides).items())))
        cells += [new_code_cell(block) for block in solutions(cell) if with_solutions]
    made.cells = cells
    return made


def execute(notebook, folder=FOLDER, timeout=900):
    """Run it on a fresh kernel of this Python in `folder`. timeout: seconds for one cell. Fault: a cell fails."""
    here = {"metadata": {"path": str(folder)}}
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # the kernel draws inline
    try:
        NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=here).execute(env=env)
    except CellExecutionError as error:
        raise Fault(str(error)) from None
    return notebook


# --- Checking ------------------------------------------------------------------------------------
def shows(source):
    """Does the cell itself print or draw? Calls inside its definitions do not count."""
    body = [node for node in ast.parse(source).body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    calls = [call.func for node in body for call in ast.walk(node) if isinstance(call, ast.Call)]
    names = [call.id if isinstance(call, ast.Name) else getattr(call, "attr", "") for call in calls]
    return bool({"print", "display", "subplots", "show", "imshow", "plot"} & set(names))


def faults(path, script_path):
    """Everything wrong with one notebook, as lines of text."""
    found = []
    text, notebook = path.read_text(encoding="utf-8"), read(path)
    silent = []
    if len(text.encode()) >= MAX_BYTES:
        found.append(f"{len(text.encode()):,} bytes; below {MAX_BYTES:,} are allowed")
    for number, cell in enumerate(notebook.cells):
        blocks = [cell.source] if cell.cell_type == "code" else solutions(cell)
        if "<details>" in cell.source and cell.cell_type == "markdown":
            if not blocks:
                found.append(f"cell {number}: a solution without a ```python block after an empty line")
            if number == 0 or notebook.cells[number - 1].cell_type != "code":
                found.append(f"cell {number}: a solution without a stub before it")
        for block in blocks:
            try:
                ast.parse(block)
            except SyntaxError as error:
                return [*found, f"cell {number}: not valid Python: {error}"]
        if cell.cell_type == "code":
            if shows(cell.source) and not cell.outputs:
                silent.append(number)
            found += [f"cell {number}: ended in {output.ename}" for output in cell.outputs
                      if output.output_type == "error"]
    if silent:
        found.append(f"no output stored for what these cells print or draw: {', '.join(map(str, silent))}")
    try:
        parameters(notebook)
        synced = copy.deepcopy(notebook)
        sync(synced, script_path.read_text(encoding="utf-8"))
        if synced != notebook:
            found.append(f"its definitions are not those of {script_path.name}: python tests/notebooks.py sync")
        clean(notebook)
        if text_of(notebook) != text:
            found.append("execution noise: python tests/notebooks.py clean")
    except Fault as fault:
        found.append(str(fault))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(prog="notebooks.py", description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("sync", "run", "clean", "check"))
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args(argv)
    chosen = [name for name in SCRIPTS if name.startswith(tuple(args.names or [""])) and (FOLDER / name).exists()]
    if not chosen:
        parser.error(f"no such notebook; there are {', '.join(SCRIPTS)}")
    bad = False
    for name in chosen:
        path, script_path = FOLDER / name, ROOT / SCRIPTS[name]
        try:
            if args.what == "check":
                found = faults(path, script_path)
            else:
                notebook, found = read(path), []
                if args.what in ("sync", "run"):
                    sync(notebook, script_path.read_text(encoding="utf-8"))
                if args.what == "run":
                    execute(notebook)
                if args.what in ("clean", "run"):
                    clean(notebook)
                write(path, notebook)
        except Fault as fault:
            found = [str(fault)]
        for line in found:
            print(f"{name}: {line}", file=sys.stderr)
        bad |= bool(found)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
