"""What mario_ddqn.py promises when something goes wrong: one line, an exit code other than 0, the last good state
intact. The faults are real ones where a test can make them (a full disk, signals, locks), else raised at the spot."""
# ruff: noqa: F811 - pytest's fixtures are imported by name
import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mario import (  # noqa: F401 - tiny and toy are fixtures
    PROGRAM,
    REAL,
    TINY,
    Toy,
    assert_same_run,
    checkpoint,
    csv_of,
    m,
    main,
    tiny,
    toy,
    train,
    tree,
)


@pytest.fixture
def run(toy, tmp_path):
    """A run of the toy, to be continued."""
    train(tmp_path / "run", "--steps", "60", "--double")
    return tmp_path / "run"


def ends_in_one_line(capsys, argv, *words, code=2):
    capsys.readouterr()
    assert main([str(word) for word in argv]) == code
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]  # the bar of a training that had begun stands before it
    assert last.startswith("mario_ddqn.py: ") and "Traceback" not in out + err
    assert not [word for word in words if word not in last], last


def kept(folder):
    """What must outlive a fault."""
    return {name: content for name, content in tree(folder).items() if name in ("last.pt", "settings.json")}


def test_a_loss_that_is_no_number_stops_before_it_spoils_the_weights(run, monkeypatch, capsys):
    before, step = kept(run), Toy.step

    def nan(self, action):
        state, _, *rest = step(self, action)
        return state, math.nan, *rest
    monkeypatch.setattr(Toy, "step", nan)
    ends_in_one_line(capsys, ["--resume", run, "--steps", "900"], "loss", "nan", "--lr")
    assert kept(run) == before
    assert all(torch.isfinite(weight).all() for weight in checkpoint(run)["local_net"].values())


def test_an_update_whose_loss_is_no_number_leaves_the_network_as_it_was():
    agent, rng = m.DQNAgent((4, 84, 84), 5, learn_start=32, memory=1000), np.random.default_rng(0)
    for _ in range(40):
        agent.remember(rng.random((4, 84, 84), np.float32), 1, math.nan, rng.random((4, 84, 84), np.float32), False)
    before = [weight.clone() for weight in agent.local_net.parameters()]
    with pytest.raises(m.UserError, match="nan"):
        agent.experience_replay()
    assert all(map(torch.equal, before, agent.local_net.parameters()))


def test_an_emulator_that_breaks_down_is_named(run, monkeypatch, capsys):
    def broken(self, action):
        raise OSError("the emulator has crashed")
    before = kept(run)
    monkeypatch.setattr(Toy, "step", broken)
    ends_in_one_line(capsys, ["--resume", run, "--steps", "900"], "game", "the emulator has crashed")
    assert kept(run) == before


def test_a_full_disk_while_the_checkpoint_is_written_keeps_the_one_before(tiny, tmp_path):
    """A real one: the system refuses to let files grow beyond 4 MB."""
    shutil.copytree(tiny, tmp_path / "run")
    before = kept(tmp_path / "run")
    done = subprocess.run([sys.executable, PROGRAM, "--resume", "run", "--steps", "400"], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "last.pt cannot be written, what was there before is untouched" in done.stderr.splitlines()[-1]
    assert kept(tmp_path / "run") == before and not list((tmp_path / "run").glob("partial*"))


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_fails_late_keeps_the_checkpoint_before(where, run, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    before = kept(run)
    monkeypatch.setattr(os, where, full)
    ends_in_one_line(capsys, ["--resume", run, "--steps", "900"], "No space left on device", "untouched")
    assert kept(run) == before and not list(run.glob("partial*"))


def test_a_full_disk_while_a_row_is_written_ends_in_one_line_and_can_be_continued(run, monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    train(tmp_path / "whole", "--steps", "200", "--double")
    with monkeypatch.context() as patch:
        patch.setattr(m.csv.DictWriter, "writerow", full)
        patch.setattr(m.csv.DictWriter, "writeheader", lambda self: None)
        ends_in_one_line(capsys, ["--resume", run, "--steps", "900"], "writing failed: No space left on device")
    assert main(["--resume", str(run), "--steps", "200"]) == 0
    assert_same_run(tmp_path / "whole", run)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys, toy):
    (tmp_path / "file").write_text("x")
    ends_in_one_line(capsys, [*TINY, "--runs", tmp_path / "file" / "runs"], "runs", "Not a directory")
    ends_in_one_line(capsys, [*TINY, "--runs", "/proc/runs"], "/proc/runs")


def test_memory_that_the_system_refuses_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(m, "available_memory", lambda: None)  # it does not say; then the allocation itself fails
    ends_in_one_line(capsys, ["--memory", str(10**13), "--runs", tmp_path], "not enough memory", "--memory")
    assert not list(tmp_path.iterdir())


def test_two_programs_cannot_train_one_run(run, capsys):
    before = kept(run)
    held = m.lock(run)
    ends_in_one_line(capsys, ["--resume", run, "--steps", "900"], "another program")
    ends_in_one_line(capsys, [*TINY, "--runs", run.parent, "--name", "run", "--force"], "another program")
    assert kept(run) == before
    held.close()
    assert main(["--resume", str(run), "--steps", "100"]) == 0


def test_a_checkpoint_of_another_version_is_refused_by_name(run, capsys):
    content = checkpoint(run)
    for changed in ({"format": 99}, {"settings": json.dumps({"stage": "1-1"})}):
        torch.save({**content, **changed}, run / "last.pt")
        before = tree(run)
        ends_in_one_line(capsys, ["--resume", run, "--steps", "900"], "another version")
        assert tree(run) == before


def test_a_checkpoint_of_another_stage_is_refused(run, capsys):
    (run / "settings.json").write_text(json.dumps({**json.loads((run / "settings.json").read_text()), "stage": "1-2"}))
    ends_in_one_line(capsys, ["--resume", run, "--steps", "900"], "different runs")


@pytest.mark.parametrize("lost", ["memory", "optimiser", "rows", "noise", "tracks", "history", "count", "held"])
def test_a_checkpoint_that_lacks_something_is_refused_and_kept(lost, run, capsys):
    torch.save({name: value for name, value in checkpoint(run).items() if name != lost}, run / "last.pt")
    before = tree(run)
    ends_in_one_line(capsys, ["--resume", run, "--steps", "900"], "last.pt", "damaged")
    assert tree(run) == before


def test_a_run_can_be_continued_from_its_very_first_step(toy, tmp_path, monkeypatch):
    """Killed before the first checkpoint that is due: there is one already."""
    train(tmp_path / "whole", "--steps", "150", "--double")
    with monkeypatch.context() as patch:
        patch.setattr(m.DQNAgent, "act", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            train(tmp_path / "run", "--steps", "150", "--double")
    assert csv_of(tmp_path / "run") == []
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_ctrl_c_twice_stops_at_once_and_keeps_the_last_checkpoint(run, monkeypatch, capsys):
    def act(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")
    before = kept(run)
    monkeypatch.setattr(m.DQNAgent, "act", act)
    ends_in_one_line(capsys, ["--resume", run, "--steps", "900"], "stopped at once", code=130)
    assert kept(run) == before


def test_an_exam_that_ctrl_c_breaks_off_is_taken_again(toy, tmp_path, monkeypatch, capsys):
    """And the run then equals one that was never interrupted."""
    flags = ["--steps", "150", "--eval-every", "50", "--eval-episodes", "4", "--double"]
    train(tmp_path / "whole", *flags)
    asked, play = [], m.play

    def interrupted(*args, **kwargs):
        if not asked:
            asked.append(signal.raise_signal(signal.SIGINT))
        return play(*args, **kwargs)
    monkeypatch.setattr(m, "play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", *flags)
    assert checkpoint(tmp_path / "run")["count"]["steps"] == 50 and checkpoint(tmp_path / "run")["exams"] == []
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    one, other = ([{k: v for k, v in exam.items() if k != "minutes"} for exam in checkpoint(tmp_path / name)["exams"]]
                  for name in ("whole", "run"))
    assert one == other and [exam["steps"] for exam in one] == [50, 100, 150]


@pytest.mark.parametrize("envs", ["1", "8"])
def test_a_busy_machine_changes_no_number(envs, tmp_path):
    """The real game, beside two processes that want two cores."""
    flags = ["--envs", envs, "--steps", "64", "--memory", "2000", "--threads", "2"]
    settings = {**REAL, "memory": 1000}
    train(tmp_path / "quiet", *flags, **settings)
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        train(tmp_path / "busy", *flags, **settings)
    finally:
        for process in load:
            process.kill()
    torch.set_num_threads(1)
    first, second = checkpoint(tmp_path / "quiet"), checkpoint(tmp_path / "busy")
    assert csv_of(tmp_path / "quiet") == csv_of(tmp_path / "busy") and first["history"] == second["history"]
    assert all(torch.equal(first["local_net"][name], second["local_net"][name]) for name in first["local_net"])


# ===== Fuzz: 2,000 inputs and more; whatever comes in, no traceback comes out

FLAGS = [action.option_strings[-1] for action in m.build_parser()._actions]
WORDS = st.one_of(st.sampled_from([*FLAGS, "tutorial", "hasselt", "noop", "1-1", "quick", "x.gif", "x.png"]),
                  st.integers().map(str), st.floats().map(str), st.text(max_size=6))
CALM = settings(max_examples=1000, deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def no_traceback(capsys, argv):
    """main returns 0 or 2, or asks to exit with 0 (--help); with 2 it prints one line."""
    capsys.readouterr()
    try:
        code = main(argv)
    except SystemExit as leave:
        assert leave.code == 0 and {"-h", "--help"} & set(argv)
        return
    err = capsys.readouterr().err
    assert code == 0 or code == 2 and err.startswith("mario_ddqn.py: ") and err.count("\n") == 1, (argv, code, err)


@CALM
@given(st.lists(WORDS, max_size=6))
def test_any_command_line_ends_without_a_traceback(tmp_path_factory, capsys, argv):
    with pytest.MonkeyPatch.context() as patch:  # as far as a training, an evaluation or a window, not into it
        patch.chdir(tmp_path_factory.getbasetemp())
        for name in ("run", "play", "plot_rewards"):
            patch.setattr(m, name, lambda *_, **__: [])
        patch.setattr(m, "write_clip", lambda *_: None)
        patch.setattr(m, "evaluate", lambda args: m.find_network(args.evaluate))
        patch.setenv("DISPLAY", ":0")
        no_traceback(capsys, argv)


@pytest.fixture(scope="session")
def small(tmp_path_factory, tiny):
    """The files of a run without their bulk: what is left is structure, so that changed bytes hit structure."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("settings.json", "episodes.csv"):
        shutil.copy(tiny / name, folder)
    for name in ("best.pt", "last.pt"):
        content = torch.load(tiny / name, weights_only=True)
        content["local_net"] = {key: value.flatten()[:3].clone() for key, value in content["local_net"].items()}
        content.pop("optimiser", None), content.pop("memory", None), content.pop("target_net", None)
        torch.save(content, folder / name)
    return folder


@CALM
@given(st.sampled_from([("best.pt", "--evaluate"), ("best.pt", "--watch"), ("last.pt", "--resume"),
                        ("settings.json", "--plot"), ("episodes.csv", "--plot"), ("settings.json", "--resume")]),
       st.one_of(st.tuples(st.just("set"), st.integers(0, 255), st.floats(0, 1, exclude_max=True)),
                 st.tuples(st.just("cut"), st.just(0), st.floats(0, 1, exclude_max=True)),
                 st.tuples(st.just("new"), st.binary(max_size=40), st.just(0.0))))
def test_any_damage_to_a_file_ends_without_a_traceback(tmp_path_factory, small, capsys, which, damage):
    (name, flag), (kind, value, place) = which, damage
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.copytree(small, folder, dirs_exist_ok=True)
    content = bytearray((folder / name).read_bytes())
    at = int(place * len(content))
    if kind == "set":
        content[at] = value
    (folder / name).write_bytes(value if kind == "new" else content[:at] if kind == "cut" else content)
    target = str(folder / name if name == "best.pt" else folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "play", lambda *_, **__: [])
        patch.setattr(m.Figure, "savefig", lambda *_, **__: None)  # all of --plot but its slow last line
        patch.setenv("DISPLAY", ":0")
        more = ["--out", str(Path(target) / "x.png")] if flag == "--plot" else []
        no_traceback(capsys, [flag, target, *more])
