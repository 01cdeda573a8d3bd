"""Keeps the notebooks true and tidy. NAME is the start of a file name (1, 2_mario); without it, all of them.

    python tests/notebooks.py clean [NAME ...]   take the noise of a run out of them
    python tests/notebooks.py sync  [NAME ...]   copy the scripts' definitions into the notebooks' cells, and clean
    python tests/notebooks.py run   [NAME ...]   sync, run on a fresh kernel, clean, save the outputs
    python tests/notebooks.py check [NAME ...]   list what is wrong with them (the tests call this)

A notebook's first code cell is tagged "parameters" and holds constants only; `variant` overrides them. A class may be
shown method by method: later cells continue it with `class DQNAgent(DQNAgent):`. An exercise is a question (Markdown),
a stub that runs (code), and a solution (Markdown): ```python blocks between <details> and </details>."""
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
MAX_BYTES, MAX_LINES = 3_000_000, 40  # of a notebook; of a code cell
PLACES = {"/home", "/root", "/Users", "/tmp", "/var/folders", "/opt", "/usr", "/mnt",  # some machine's, and this one's
          *map(str, (ROOT, Path.home(), tempfile.gettempdir(), sys.prefix, sys.base_prefix))} - {"/"}
NOISE = {
    "an absolute path": rf"(?<![\w.~/])(?:{'|'.join(map(re.escape, PLACES))})(?:/[\w.@+-]+)*(?![\w-])",
    "an object's address": r"\bat 0x[0-9a-fA-F]{6,}"}  # <Agent object at 0x7f...>: another one in every run
SHOWS = r"(?m)^(?! ).*\b(print|show|pictures|display)\("  # in a line that is not indented


class Fault(Exception):
    """Something that must not be kept in a notebook."""


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def definitions(source):
    """{name: (first line, line after the last)} of the functions, the CONSTANTS, the methods ("Class.method"), and the
    classes ("Class"), from the first line to the first method. A class that continues itself has only methods."""
    def first(node):
        return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1

    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = first(node), node.end_lineno
        elif isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            head = node.body[:node.body.index(methods[0])] if methods else node.body
            if node.name not in [getattr(base, "id", None) for base in node.bases]:
                found[node.name] = first(node), head[-1].end_lineno if head else first(methods[0])
            found |= {f"{node.name}.{method.name}": (first(method), method.end_lineno) for method in methods}
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            found[node.targets[0].id] = node.lineno - 1, node.end_lineno
    return found


def sync(notebook, script_source):
    """Put the script's text in place of every definition of the same name, outside the parameters' cell."""
    script, script_lines = definitions(script_source), script_source.split("\n")
    for cell in code_cells(notebook):
        lines = cell.source.split("\n")
        for name, (first, last) in reversed(definitions(cell.source).items()):  # from below: line numbers hold
            if name in script and "parameters" not in cell.metadata.get("tags", []):
                lines[first:last] = script_lines[slice(*script[name])]
        cell.source = "\n".join(lines)


def clean(notebook):
    """stderr (progress bars, warnings) goes; what one cell prints in turn becomes one text. Returns the file's text.
    Fault: an absolute path or an object's address."""
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}})
    notebook.nbformat, notebook.nbformat_minor, count = 4, 5, 0
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.source = f"cell-{number}", cell.source.strip("\n")
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in ("tags",) if cell.metadata.get(key)})
        shown = [cell.source]
        if cell.cell_type == "code":
            count += 1
            cell.execution_count, outputs, cell.outputs = count, cell.outputs, []
            for output in (output for output in outputs if output.get("name") != "stderr"):
                if cell.outputs and cell.outputs[-1].output_type == output.output_type == "stream":
                    cell.outputs[-1].text += output.text
                else:
                    cell.outputs.append(output)
                if output.output_type == "execute_result":
                    output.execution_count = count
                shown += [output.get("text", ""), *map(str, {**output.get("data", {}), "image/png": ""}.values())]
        for what, pattern in NOISE.items():
            if match := re.search(pattern, "\n".join(shown)):
                raise Fault(f"cell {number} holds {what}: {match[0]}")
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def parameters(notebook):
    """{name: value} of the first code cell. Fault: it is not tagged, or holds more than constants."""
    cell = code_cells(notebook)[0]
    try:
        assert cell.metadata.tags == ["parameters"]
        return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    except (AssertionError, AttributeError, ValueError):
        raise Fault('the first code cell is not tagged "parameters", or holds more than constants') from None


def solutions(cell):
    """The Python blocks between <details> and </details>."""
    hidden = re.findall(r"<details>.*?</details>", cell.source, re.S) if cell.cell_type == "markdown" else []
    return [block for part in hidden for block in re.findall(r"\n\n```python\n(.*?)\n```", part, re.S)]


def variant(notebook, overrides=(), with_solutions=True):
    """A copy with other parameters, and with the solutions as cells after their stubs."""
    made, overrides = copy.deepcopy(notebook), dict(overrides)
    if unknown := overrides.keys() - parameters(notebook).keys():
        raise Fault(f"no such parameters: {', '.join(sorted(unknown))}")
    made.cells = [part for cell in made.cells for part in (
        cell, *(new_code_cell(block) for block in solutions(cell) if with_solutions))]
    changes = new_code_cell("\n".join(f"{name} = {value!r}" for name, value in overrides.items()))
    made.cells.insert(made.cells.index(code_cells(made)[0]) + 1, changes)
    return made


def execute(notebook, folder=FOLDER, timeout=900):
    """Run it on a fresh kernel of this Python in `folder`. timeout: seconds for a cell. CellExecutionError."""
    os.environ.pop("MPLBACKEND", None)  # the kernel draws inline
    return NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()


def faults(path, script_path):
    text, notebook = path.read_text(encoding="utf-8"), nbformat.read(path, 4)
    found = ["it is too large"] if len(text.encode()) > MAX_BYTES else []
    for number, cell in enumerate(notebook.cells):
        code, lines, outputs = cell.cell_type == "code", len(cell.source.split("\n")), cell.get("outputs", [])
        found += [f"cell {number}: {what}" for what, so in {
            "a solution without a ```python block": ("<details>" in cell.source) > len(solutions(cell)),
            f"{lines} lines; {MAX_LINES} are allowed": code and lines > MAX_LINES,
            "no output stored for what it prints or draws": code and re.search(SHOWS, cell.source) and not outputs,
            "ended in an error": any(output.output_type == "error" for output in outputs)}.items() if so]
    try:
        parameters(notebook)
        synced = copy.deepcopy(notebook)
        sync(synced, script_path.read_text(encoding="utf-8"))
        if synced != notebook:
            found.append(f"its definitions are not those of {script_path.name}: python tests/notebooks.py sync")
        if clean(notebook) != text:
            found.append("execution noise: python tests/notebooks.py clean")
    except (Fault, SyntaxError) as fault:
        found.append(str(fault))
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("sync", "run", "clean", "check"))
    parser.add_argument("names", nargs="*", metavar="NAME", default=[""])
    args, found = parser.parse_args(argv), []
    names = [name for name in SCRIPTS if name.startswith(tuple(args.names))]
    if not names:
        parser.error(f"no notebook begins with {' or '.join(args.names)}")
    for name in names:
        path, script_path = FOLDER / name, ROOT / SCRIPTS[name]
        try:
            notebook = nbformat.read(path, 4)
            if args.what == "check":
                found += [f"{name}: {fault}" for fault in faults(path, script_path)]
                continue
            if args.what != "clean":
                sync(notebook, script_path.read_text(encoding="utf-8"))
            if args.what == "run":
                execute(notebook)
            text = clean(notebook).encode()
            save_whole(path, lambda unfinished, text=text: unfinished.write_bytes(text))
        except (Fault, SyntaxError, CellExecutionError) as fault:
            found.append(f"{name}: {fault}")
    return "\n".join(found)


if __name__ == "__main__":
    sys.exit(main() or 0)
