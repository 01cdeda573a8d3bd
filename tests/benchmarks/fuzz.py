"""Throws random command lines and damaged files at mario_ddqn.py. Each must end in exit code 0 or in one line and exit
code 2; anything else is counted as a traceback. The program is followed up to the training, the game or the drawing.

    python tests/benchmarks/fuzz.py [--inputs 2000] [--out results/fuzz.json]
"""
import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import TINY, Toy, exit_code, m  # noqa: E402

FLAGS = [action.option_strings[-1] for action in m.build_parser()._actions]
WORD = st.one_of(st.sampled_from([*FLAGS, "tutorial", "hasselt", "noop", "1-1", "quick", "x.gif", "x.png", "x.json"]),
                 st.integers().map(str), st.floats().map(str),  # no command line can hold a 0 byte
                 st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6))
NASTY = [None, [], {}, "x", "9-9", -1, 0, 0.5, 10**30, float("nan"), True, "[" * 5000, [[{}]], {"format": 2}]
DAMAGE = st.one_of(*(st.tuples(st.just(kind), what, st.floats(0, 1, exclude_max=True)) for kind, what in {
    "byte": st.binary(min_size=1, max_size=1), "cut": st.just(b""), "new": st.binary(max_size=40),
    "value": st.sampled_from(NASTY)}.items()))
FILES = {"network.pt": ["--evaluate"], "last.pt": ["--resume", "--steps", "90"],
         "settings.json": ["--resume", "--steps", "90"], "episodes.csv": ["--plot", "--out", "x.png"]}


def small_network(input_shape, n_actions):
    """In place of DQNSolver where the files of a run, not its learning, are looked at."""
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, n_actions))


def damage(path, kind, value, place):
    """One byte is set, the rest is cut off, all is new, or one named value inside the file is replaced."""
    at = int(place * len(content := path.read_bytes()))
    if kind != "value":
        path.write_bytes({"new": value, "cut": content[:at]}.get(kind, content[:at] + value + content[at + 1:]))
    elif path.suffix == ".csv":
        cells = content.decode().split(",")
        cells[int(place * len(cells))] = str(value)
        path.write_text(",".join(cells))
    else:
        parts = torch.load(path, weights_only=True) if path.suffix == ".pt" else json.loads(content)
        parts[list(parts)[int(place * len(parts))]] = value
        torch.save(parts, path) if path.suffix == ".pt" else path.write_text(json.dumps(parts))


def throw(strategy, inputs, prepare):
    """Counts the outcomes of so many inputs; `prepare` makes the command line of one. Returns (counts, failures)."""
    counts, failures = {"inputs": 0, "accepted": 0, "refused": 0, "traceback": 0}, []

    @settings(max_examples=inputs, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(strategy)
    def one(drawn):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                code = exit_code(prepare(drawn))
            except Exception:
                code = 1
        last = err.getvalue().strip().rpartition("\n")[2]  # a bar may stand before it
        clear = last.startswith("mario_ddqn.py: error: ")
        result = "accepted" if code == 0 else "refused" if code == 2 and clear else "traceback"
        counts["inputs"], counts[result] = counts["inputs"] + 1, counts[result] + 1
        failures.extend([repr(drawn)] * (result == "traceback"))
    one()
    return counts, failures


def fuzz(inputs):
    """Half are command lines, half damaged files in the working directory. Returns their counts and the failures."""
    parts = {"make_env": lambda *_: Toy(), "DQNSolver": small_network, "play": lambda *_: [("died", 40, None)],
             "play_episode": mock.Mock(side_effect=KeyboardInterrupt), "open_window": mock.Mock(),
             "write_clip": mock.Mock()}

    def damaged(drawn):
        name, how = drawn
        shutil.copytree("whole", "damaged", dirs_exist_ok=True)
        damage(Path("damaged", name), *how)
        return [FILES[name][0], "damaged", *FILES[name][1:]]
    with mock.patch.multiple(m, **parts), mock.patch.dict(os.environ, DISPLAY=":0"):
        assert m.main([*TINY, "--steps", "80", "--out", "whole"]) == 0
        with mock.patch.multiple(m, run=mock.Mock(), plot_rewards=mock.Mock(), write_atomically=mock.Mock()):
            lines, failed = throw(st.lists(WORD, max_size=6), inputs // 2, list)
        stop = m.UserError("enough")  # a run that was resumed ends at its first step
        with mock.patch.object(m, "step_game", side_effect=stop), mock.patch.object(m.Figure, "savefig"):
            files, more = throw(st.tuples(st.sampled_from(list(FILES)), DAMAGE), inputs - inputs // 2, damaged)
    return {"command_lines": lines, "damaged_files": files}, failed + more


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(m.__file__).parent / "results" / "fuzz.json")
    args = parser.parse_args()
    out = args.out.absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        counts, failures = fuzz(args.inputs)
    print(json.dumps(counts, indent=1), *failures[:10], sep="\n")
    out.write_text(json.dumps(counts, indent=1) + "\n")
