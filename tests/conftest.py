"""What several test files share: a toy in place of the game, one short real run, and how two runs are compared."""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

sys.path.insert(0, str(Path(__file__).with_name("benchmarks")))  # for all test files
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mario_ddqn as m

ROOT = Path(m.__file__).resolve().parent
torch.set_num_threads(1)
TINY = ("--envs 2 --steps 300 --learn-start 40 --batch 8 --copy-every 7 --n-step 3 --eps-decay 0.97 --memory 1000 "
        "--train-noise epsilon --no-bfloat16").split()  # a run of a second or two
# Two real games: two deaths and an episode that is cut off. ε stays 1: no rounding decides what is played.
REAL = [*TINY, *"--double hasselt --steps 240 --seed 3 --patience 30 --train-every 8 --eps-decay 1".split()]


def exit_code(argv):
    """What the shell gets."""
    try:
        return m.main(argv)
    except SystemExit as leave:  # argparse's own, after --help or a word that it does not know
        return leave.code


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of the finished run REAL, made once for all of pytest's workers. Not to be written to: use a copy."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with FileLock(root / "tiny.lock"):
        if not (root / "tiny").exists():
            unfinished = tmp_path_factory.mktemp("unfinished")
            assert m.main([*REAL, "--out", str(unfinished)]) == 0
            unfinished.rename(root / "tiny")
    return root / "tiny"


class Toy(m.gym.Env):
    """A game of a dozen steps that looks like the real one from above. x grows with the action; the newest frame's
    brightness tells x and t. Step `death_at` is death, x from `clear_at` on clears, step `cut` is truncated."""

    cut, clear_at, death_at = None, 100, 12

    def look(self):
        self.frames = [*self.frames[1:], np.full((84, 84), (self.x * 7 + self.t * 13) % 251, np.uint8)]
        self.info = {"x_pos": self.x, "picture": np.full((240, 256, 4), self.x % 256, np.uint8)}
        return np.stack(self.frames).astype(np.float32) / 255  # (4, 84, 84)

    def reset(self, **kwargs):
        self.x, self.t, self.frames = 40, 0, [np.zeros((84, 84), np.uint8)] * 4
        return self.look(), self.info

    def step(self, action):
        moved = (0, 1, 2, 4, 9)[action]
        self.x, self.t = self.x + moved, self.t + 1
        cleared = self.x >= self.clear_at
        return (self.look(), float(moved), cleared or self.t >= self.death_at, self.t == self.cut,
                {**self.info, "flag_get": cleared})


@pytest.fixture
def toy(monkeypatch):
    """Toy in place of the emulator. The class is the test's own: it may set toy.cut and the like."""
    toy = type("Toy", (Toy,), {})
    monkeypatch.setattr(m, "make_env", lambda *_: toy())
    return toy


def csv_of(folder):
    """The rows without the time they took."""
    lines = (folder / "episodes.csv").read_text().splitlines()
    return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(lines)]


def checkpoint(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def same(one, other):
    """Equality all the way down: of dicts, lists and tensors."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def assert_same_run(one, other):
    """The same rows, and the same checkpoint but for the time it took: weights, optimizer, memory, generator, games."""
    assert csv_of(one) == csv_of(other) and len(csv_of(one)) >= 2
    for folder in (one, other):
        clock = [row["seconds"] for row in m.read_rows(folder)] + [checkpoint(folder)["seconds"]]
        assert clock == sorted(clock), "after a stop the time goes on"
    first, second = ({**checkpoint(folder), "seconds": 0} for folder in (one, other))
    assert first.keys() == second.keys() and not [name for name in first if not same(first[name], second[name])]
