"""Sections 1 and 7 of mario_ddqn.py, settings and command line. Whatever cannot be meant ends in one clear line and
exit code 2, before any game is started, and nothing is overwritten."""
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import TINY, Toy, checkpoint, exit_code, m
from fuzz import fuzz, small_network


def tree(folder):
    """Everything below the folder: path -> content."""
    return {path: path.read_bytes() if path.is_file() else "no file" for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run of the toy with a network of 25 weights."""
    folder = tmp_path_factory.mktemp("small") / "run"
    with mock.patch.multiple(m, DQNSolver=small_network, make_env=lambda *_: Toy()):
        assert m.main([*TINY, "--steps", "60", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def place(small_run, tmp_path, monkeypatch, toy):
    """The folder where commands are typed. It holds `run`, a copy of small_run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(m, "DQNSolver", small_network)
    shutil.copytree(small_run, "run")
    return tmp_path


@pytest.fixture
def refused(place, capsys):
    """refused(argv, *words): one line that holds these words, exit code 2, no game started, nothing written."""
    def check(argv, *words):
        before = tree(place)
        capsys.readouterr()
        with mock.patch.object(m, "step_game", side_effect=AssertionError("a game was started")):
            code = exit_code([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert (code, err.count("\n"), err[:22]) == (2, 1, "mario_ddqn.py: error: "), err
        assert "Traceback" not in out + err and not [word for word in words if str(word) not in err], err
        assert tree(place) == before
    return check


@pytest.mark.parametrize("argv", [
    "--gamma 2", "--gamma nan", "--gamma x", "--gamma=-0.1", "--n-step 1.5", "--batch 0", "--steps -1", "--lr 0",
    "--reward-scale inf", f"--episodes {10**30}", "--double foo", "--stage 9-9", "--stage 1-1,9-9", "--device cpu",
    "--train-noise foo", "--preset foo", "--noise foo", "--x steps", "--foo", "foo", "--gam 0.5", "--gamma", "--plot",
    "--resume", "--out", "--show-jump=no", "--learn-start 60000", "--envs 1 --stage 1-1,1-2", "--stage 9-9 --evaluate",
    "--memory 1000 --envs 64 --learn-start 9",
    # a flag that does nothing here
    "--noise noop", "--seed 1 --evaluate run --steps 5", "--preset quick --resume run", "--plot run --watch run",
    "--gamma 0.9 --resume run", "--out new --resume run", "--steps 5 --watch run", "--seed 1 --plot run",
    "--noise noop --plot run", "--resume run --evaluate run", "--stage 1-1,1-2 --evaluate run",
    # numbers of the other modes
    "--episodes 0 --evaluate run --noise noop", "--seed -1 --evaluate run",
    f"--episodes {10**30} --watch run --out x.gif", f"--steps {10**30} --resume run", "--steps=-1 --resume run"])
def test_what_cannot_be_meant_is_refused(argv, refused):
    words = argv.split()
    named = [word for word in words if word == "--steps"] or [words[0]]
    refused(words, named[-1].split("=")[0])


@pytest.mark.parametrize("name", [spec.name for spec in fields(m.Settings) if spec.type is int])
def test_every_whole_number_has_bounds_and_is_whole(name):
    for value in (10**30, -1, 0.5, 2.0, True, "1", None):
        with pytest.raises(m.UserError, match=f"--{name.replace('_', '-')}: "):
            m.Settings(**{name: value})


def test_settings_from_python_get_the_message_of_the_command_line(refused):
    for wrong in ({"gamma": 2.0}, {"envs": 65}, {"lr": 0.0}, {"stage": "9-9"}, {"memory": 1000},
                  {"train_every": 0, "batch": 1}):
        with pytest.raises(m.UserError) as error:
            m.Settings(**wrong)
        refused([f"--{name.replace('_', '-')}={value}" for name, value in wrong.items()], f" {error.value}\n")
    for misspelt in (lambda: m.evaluate("run", noise="nop"), lambda: m.watch("run", noise="nop")):
        with pytest.raises(m.UserError, match="noise: 'nop'"):
            misspelt()
    for wrong in ({"gamma": "0.9"}, {"gamma": math.nan}, {"show_jump": "no"}, {"double": None}, {"stage": ["1-1"]}):
        with pytest.raises(m.UserError, match=list(wrong)[0].replace("_", "-")):
            m.Settings(**wrong)


def test_the_presets(place, monkeypatch):
    """The tutorial's settings to the letter. What is typed wins, also where it equals the default."""
    settings, run = [], m.run
    monkeypatch.setattr(m, "run", lambda chosen, folder: settings.append(chosen))
    assert m.main(["--preset", "tutorial", "--double"]) == m.main(["--preset", "quick"]) == 0
    assert m.main(["--gamma", "0.95", "--preset", "tutorial", "--double", "hasselt", "--show-jump"]) == 0
    tutorial, quick, mixed = settings
    assert asdict(tutorial) == {
        "double": "tutorial", "gamma": 0.90, "n_step": 1, "lr": 2.5e-4, "lr_end": 2.5e-4, "batch": 32, "train_every": 1,
        "copy_every": 5_000, "memory": 30_000, "learn_start": 32, "priority": 0, "reward_scale": 1, "flag_bonus": 0,
        "eps_decay": 0.99, "eps_min": 0.02, "train_noise": "none", "practice": 0, "search": 0, "patience": 10**6,
        "episodes": 10_000, "steps": 0, "stage": "1-1", "show_jump": False, "envs": 1, "seed": 0, "bfloat16": False}
    assert quick.double == "single" and quick.steps <= 1000 and quick.learn_start < quick.steps / 2
    assert (mixed.double, mixed.gamma, mixed.show_jump, mixed.memory) == ("hasselt", 0.95, True, 30_000)
    for preset in m.PRESETS:
        run(m.Settings(**{**m.PRESETS[preset], "steps": 600, "memory": 1000, "learn_start": 40}), place / preset)
        assert checkpoint(place / preset)["updates"] > 0


def test_the_help_names_every_setting_and_its_default_also_without_unicode(tmp_path):
    done = subprocess.run([sys.executable, m.__file__, "--help"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "200"})
    assert (done.returncode, done.stderr) == (0, "") and "? per update" in done.stdout
    for spec in fields(m.Settings):
        assert f"--{spec.name.replace('_', '-')}" in done.stdout and f"(default: {spec.default})" in done.stdout


def test_a_new_run_takes_the_next_free_folder_and_no_other_is_touched(place, refused):
    for rule, folder in ((["--double"], "tutorial-1"), (["--double"], "tutorial-2"), ([], "single-1")):
        assert m.main([*TINY, *rule, "--steps", "4"]) == 0 and (place / "runs" / folder / "episodes.csv").exists()
    (place / "file").write_text("x")
    for out in ("run", "file", "file/run", "", "..", "/proc/run", "x.png", "run/network.pt"):
        refused(["--out", out], out)
    assert m.main([*TINY, "--steps", "4", "--out", "two\nlines"]) == 0
    refused(["--out", "two\nlines"])


@pytest.mark.parametrize("mode, own", [("--evaluate", "x.json"), ("--plot", "x.png"), ("--watch", "x.gif")])
def test_no_file_of_a_run_is_overwritten(mode, own, refused, place):
    (place / "folder.json").mkdir()
    for out in {"run/network.pt", "run/last.pt", "run/settings.json", "run/episodes.csv", "run/lock", "", "..", "run",
                "x", "x.txt", ".json", "x.json", "x.png", "x.gif", "folder.json", "run/SETTINGS.json"} - {own}:
        refused([mode, "run", "--out", out], "--out")


def test_what_this_machine_lacks_is_said(refused, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")  # opencv-python opens windows on X11 only
    refused(["--watch", "run"], "display", "--out")
    for error in (MemoryError, RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(m, "ReplayMemory", mock.Mock(side_effect=error))
        refused(["--memory", 10**8], "not enough memory", "--memory")
    monkeypatch.setattr(m, "ReplayMemory", mock.Mock(side_effect=RuntimeError("a fault of the program")))
    pytest.raises(RuntimeError, m.main, [])


def test_printed_commands_name_the_interpreter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setattr(m, "__file__", str(tmp_path / "mario_ddqn.py"))
    monkeypatch.setattr(os, "sep", "\\")  # as on Windows, whose PowerShell runs no program that is named in quotes
    assert m.command("--resume", Path("a run"), "b\\c") == ".venv/bin/python mario_ddqn.py --resume 'a run' b/c"


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def flip(path):
    """Another byte in a tensor's data."""
    content = bytearray(path.read_bytes())
    content[content.index(checkpoint(path.parent, path.name)["local_net"]["2.weight"].numpy().tobytes()) + 5] ^= 255
    path.write_bytes(content)


def changed(**parts):
    def change(path):
        content = {**checkpoint(path.parent, path.name), **parts}
        torch.save({name: value for name, value in content.items() if value != "gone"}, path)
    return change


def settings_text(**more):
    return json.dumps({**asdict(m.Settings()), **more})


NAN = {"2.weight": torch.full((5, 4), math.nan), "2.bias": torch.zeros(5)}
NETWORKS = {  # for network.pt and last.pt
    "absent": Path.unlink, "empty": lambda path: path.write_bytes(b""), "text": lambda path: path.write_text("x" * 99),
    "a folder": lambda path: (path.unlink(), path.mkdir()), "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-30]), "one byte": flip, "NaN": changed(local_net=NAN),
    "a hostile pickle": lambda path: path.write_bytes(pickle.dumps(Hostile())),
    "a hostile part": changed(local_net=Hostile()), "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "another version": changed(format=99), "no format": changed(format="gone"), "no weights": changed(local_net="gone"),
    "another network": changed(local_net=torch.nn.Linear(2, 2).state_dict())}
SETTINGS = {"no settings": "gone", "out of range": settings_text(envs=0), "unknown": settings_text(halt=1),
            "text for a number": settings_text(gamma="x"), "deeply nested": "[" * 100_000, "a list": "[]", "half": "{"}
PARTS = [*m.DQNAgent.PARTS, "steps", "updates", "learnt", "generator", "rows", "seconds", "games"]


@pytest.mark.parametrize("kind", [*NETWORKS, *SETTINGS])
def test_a_network_that_is_damaged_or_foreign_is_refused(kind, refused, place):
    (NETWORKS[kind] if kind in NETWORKS else changed(settings=SETTINGS[kind]))(place / "run" / "network.pt")
    refused(["--evaluate", "run"], "network.pt")
    refused(["--watch", "run/network.pt", "--out", "new/x.gif"], "network.pt")
    assert not (place / "executed").exists()


@pytest.mark.parametrize("kind", [*NETWORKS, *PARTS, "steps are text", "another number of games", "a network"])
def test_a_checkpoint_that_is_damaged_or_foreign_is_refused(kind, refused, place):
    other = {"steps are text": changed(steps="x"), "another number of games": changed(games=[]),
             "a network": lambda path: shutil.copy("run/network.pt", path)}
    ({**NETWORKS, **other}.get(kind) or changed(**{kind: "gone"}))(place / "run" / "last.pt")
    refused(["--resume", "run", "--steps", "900"], "last.pt")
    assert not (place / "executed").exists()
    pickle.loads(pickle.dumps(Hostile()))
    assert (place / "executed").exists(), "the hostile file does harm where it is trusted"


@pytest.mark.parametrize("kind", [*SETTINGS, "not text", "of other games"])
def test_a_settings_file_that_is_damaged_or_foreign_is_refused(kind, refused, place):
    text = {**SETTINGS, "of other games": settings_text(envs=3)}.get(kind, "\xff").replace("gone", "")
    (place / "run" / "settings.json").write_bytes(text.encode("latin-1"))
    refused(["--resume", "run", "--steps", "900"], "last.pt" if kind == "of other games" else "settings.json")


def test_a_table_that_is_empty_or_damaged_is_neither_drawn_nor_continued(refused, place):
    whole = (table := place / "run" / "episodes.csv").read_text()
    header, first = whole.splitlines()[:2]
    for text in ("", header + "\n", "\xff\xfe", whole + "12,9\n", f"{header}\n{first.replace('.', 'x')}\n"):
        table.write_bytes(text.encode("latin-1"))
        refused(["--plot", "run", "--out", "x.png"], "episodes.csv")
        refused(["--resume", "run", "--steps", "900"], "episodes.csv")
    for missing in ("nowhere", "run/settings.json"):
        refused(["--plot", missing, "--out", "new/x.png"], missing)
        refused(["--resume", missing], missing)


def test_two_hundred_random_inputs_end_without_a_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts, failures = fuzz(200)
    assert failures == [] and sum(kind["inputs"] for kind in counts.values()) == 200
    assert all(kind["accepted"] and kind["refused"] for kind in counts.values())


def test_ctrl_c_during_the_imports_ends_without_a_traceback(tmp_path):
    """A module that takes 50 s stands in for the slow ones. (Python misses a signal just before a long sleep.)"""
    (tmp_path / "cv2.py").write_text("import time\nprint('importing', flush=True)\nfor _ in range(99): time.sleep(0.5)")
    process = subprocess.Popen([sys.executable, m.__file__], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert process.stdout.readline() == b"importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == (b"", b"") and process.returncode == 130
