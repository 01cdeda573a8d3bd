"""Section 5 of mario_ddqn.py, the training loop. After every kind of interruption the same run goes on. Every kind of
fault ends in one clear line, and the last checkpoint is intact. Faults are real ones where a test can make them."""
import errno
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import REAL, TINY, assert_same_run, checkpoint, csv_of, m
from fuzz import small_network
from PIL import Image

ALONE = "--envs 1 --train-noise none --learn-start 490 --reward-scale 1 --practice 0".split()  # one game, no learning


def before_act(patch, hook, act=m.DQNAgent.act):
    """`hook(agent)` runs whenever the agent is to choose its actions."""
    patch.setattr(m.DQNAgent, "act", lambda self, states: (hook(self), act(self, states))[1])


def call(*argv, at=0, stop=0):
    """Runs the program; at step `at` it gets the signal `stop`, if any."""
    with pytest.MonkeyPatch.context() as patch:
        if stop:
            before_act(patch, lambda agent: signal.raise_signal(stop) if agent.steps >= at else None)
        assert m.main([*map(str, argv)]) == (128 + stop if stop else 0)


def train(folder, *flags, **stop):
    return call(*TINY, *flags, "--out", folder, **stop) or folder


@pytest.fixture
def small(toy, monkeypatch):
    """The toy game, a network of 25 weights and no plot: for the loop and its files, not for what is learnt."""
    monkeypatch.setattr(m, "DQNSolver", small_network)
    monkeypatch.setattr(m, "plot_rewards", lambda *_: None)
    return toy


@pytest.fixture
def folder(small, tmp_path):
    return train(tmp_path / "run", "--steps", "60", "--double")


def kept(folder):
    return {name: (folder / name).read_bytes() for name in ("last.pt", "network.pt", "settings.json")}


def ends_in_one_line(capsys, folder, *words, steps=900, code=2):
    """The run, resumed, ends so, and its last checkpoint is as before."""
    before = kept(folder)
    capsys.readouterr()
    assert m.main(["--resume", str(folder), "--steps", str(steps)]) == code
    err = capsys.readouterr().err
    last = err.splitlines()[-1]  # the bar of a training that had begun stands before it
    assert last.startswith("mario_ddqn.py: ") and not [word for word in words if word not in last], err
    assert kept(folder) == before


def test_a_real_run_interrupted_in_mid_episode_equals_the_whole_one(tiny, tmp_path):
    call(*REAL, "--out", tmp_path / "run", at=130, stop=signal.SIGINT)
    assert all(0 < len(game["actions"]) for game in checkpoint(tmp_path / "run")["games"][:2])
    call("--resume", tmp_path / "run")
    assert_same_run(tiny, tmp_path / "run")


@pytest.mark.parametrize("rule, noise", [("single", "noop"), ("tutorial", "epsilon"), ("hasselt", "sticky")])
def test_a_run_interrupted_twice_equals_the_whole_one(rule, noise, small, tmp_path, monkeypatch):
    """Three games whose rings of frames are full at the second stop, in bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    small.death_at, flags = 60, f"--double {rule} --train-noise {noise} --envs 3 --steps 2100 --bfloat16".split()
    train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, at=51, stop=signal.SIGINT)
    call("--resume", tmp_path / "parts", at=2001, stop=signal.SIGTERM)
    call("--resume", tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    memory = checkpoint(tmp_path / "parts")["memory"]
    assert memory["priority"].shape == (3, 334) and memory["written"].min() > 334


@pytest.mark.parametrize("last_checkpoint", [0, 60])
def test_after_a_crash_the_rows_later_than_the_checkpoint_happen_again(last_checkpoint, small, tmp_path, monkeypatch):
    def crash_at_120(agent):
        m.CHECKPOINT_SECONDS = -1 if agent.steps < last_checkpoint else 10**9
        if agent.steps >= 120:
            sys.exit(9)
    train(tmp_path / "whole", "--steps", "300", "--double")
    with monkeypatch.context() as patch:
        patch.setattr(m, "CHECKPOINT_SECONDS", 10**9)
        before_act(patch, crash_at_120)
        with pytest.raises(SystemExit):
            train(tmp_path / "run", "--steps", "300", "--double")
    saved = checkpoint(tmp_path / "run")
    assert saved["steps"] == last_checkpoint and len(csv_of(tmp_path / "run")) > saved["rows"]
    call("--resume", tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_busy_machine_changes_no_number(small, tmp_path, monkeypatch):
    """Eight games, each of whose steps takes a random time, and at last a thread for each game."""
    flags, step, rng = ["--envs", "8", "--steps", "400", "--learn-start", "20"], small.step, np.random.default_rng(0)
    train(tmp_path / "quiet", *flags)
    train(tmp_path / "other", *flags, "--seed", "1")
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    monkeypatch.setattr(small, "step", lambda *args: (time.sleep(rng.random() / 500), step(*args))[1])
    train(tmp_path / "busy", *flags)
    assert_same_run(tmp_path / "quiet", tmp_path / "busy")
    assert csv_of(tmp_path / "quiet") != csv_of(tmp_path / "other"), "another seed, another run"


def test_a_run_leaves_readable_files(tiny):
    settings, rows = json.loads((tiny / "settings.json").read_text()), m.read_rows(tiny)
    assert settings == json.loads(checkpoint(tiny, "network.pt")["settings"]) == asdict(m.Settings(**settings))
    assert [row["episode"] for row in rows] == [*range(1, len(rows) + 1)] and sum(row["loss"] > 0 for row in rows) > 1
    exact, half = checkpoint(tiny)["local_net"], checkpoint(tiny, "network.pt")["local_net"]
    assert exact.keys() == half.keys() and all(torch.equal(exact[name].half(), half[name]) for name in exact)
    with Image.open(tiny / "rewards.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    assert sorted(os.listdir(tiny)) == "episodes.csv last.pt lock network.pt rewards.png settings.json".split()


@pytest.mark.parametrize("every, envs", [(4, 2), (1, 2), (3, 4)])
def test_the_agent_learns_once_every_train_every_steps(every, envs, small, tmp_path, monkeypatch):
    """And a row of the table has the mean loss and Q of the updates since the row before, and ε."""
    updates, before = [], 0  # updates: at how many steps

    def learn(agent):
        updates.append(agent.steps)
        agent.updates = len(updates)
        agent.learnt.append((float(len(updates)), -float(len(updates))))
    monkeypatch.setattr(m.DQNAgent, "experience_replay", learn)
    rows = m.run(m.Settings(train_every=every, envs=envs, steps=121), tmp_path / "run")
    assert len(updates) == (121 + envs - 1) // envs * envs // every
    for row in rows:
        now = sum(steps < row["env_steps"] for steps in updates)
        assert now == before or row["loss"] == -row["mean_q"] == np.mean(range(before + 1, now + 1))
        assert row["epsilon"] == round(0.9995 ** now, 5)
        before = now
    assert len(checkpoint(tmp_path / "run")["learnt"]) == len(updates) - before


@pytest.mark.parametrize("noise", ["sticky", "epsilon"])
def test_what_was_played_is_remembered_and_stands_in_the_table(noise, small, tmp_path, monkeypatch):
    """Both games are played again from the remembered actions. The bonus for the flag is in no return of the table."""
    chosen, games, rows, slips, act, remember = [], ([], []), [], 0, m.DQNAgent.act, m.DQNAgent.remember

    def remembered(self, state, action, reward, next_state, terminal, truncated, env):
        games[env].append((action, state[-1, 0, 0], reward, next_state[-1, 0, 0], terminal))
        remember(self, state, action, reward, next_state, terminal, truncated, env)
    monkeypatch.setattr(m.DQNAgent, "act", lambda self, states: chosen.append(got := act(self, states)) or got)
    monkeypatch.setattr(m.DQNAgent, "remember", remembered)
    small.clear_at = 70
    run = train(tmp_path / "run", *ALONE, "--envs", "2", "--train-noise", noise, "--steps", "0", "--episodes", "20")
    for env, steps in enumerate(games):
        game, over = small(), True
        for action, *transition in steps:
            if over:
                state, points, length = game.reset()[0], 0, 0
            last = state
            state, reward, over, _, info = game.step(action)
            bonus, points, length = 50 * info["flag_get"], points + reward, length + 1
            assert transition == [last[-1, 0, 0], reward + bonus, state[-1, 0, 0], over]
            rows += [(points, length, info["x_pos"], info["flag_get"])] * over
        slips += sum(step[0] != actions[env] for step, actions in zip(steps, chosen, strict=True))
    table = [tuple(row[name] for name in ("return", "length", "furthest_x", "cleared")) for row in m.read_rows(run)]
    assert m.main(["--resume", str(run)]) == 2, "it has all the episodes that it was to have"
    assert sorted(table) == sorted(rows) and 20 <= len(rows) <= 21 and {0, 1} == {row[3] for row in rows} and slips > 3


@pytest.fixture
def begun(small, monkeypatch):
    """Of every game that a run begins: the episode, its opening, the game kept then, and the lengths of own games."""
    games, make = [], m.next_episode
    monkeypatch.setattr(m, "next_episode", lambda *a: games.append((new := make(*a), [*new.actions], *a[1:])) or new)
    return games


def test_practice_begins_within_the_last_cleared_game(begun, small, tmp_path, monkeypatch):
    """The flag stands at x = 100, and later so far away that lost games pass that place, too."""
    small.death_at = 14
    before_act(monkeypatch, lambda agent: setattr(small, "clear_at", 100 if agent.steps < 1500 else 900))
    rows = m.run(m.Settings(practice=0.3, steps=3000, learn_start=9000, envs=2, train_noise="none", seed=5),
                 tmp_path / "run")
    after = [game for game in begun if game[2].cleared]
    practice = [game for game in after if game[0].practice]
    assert len(begun) - len(after) > 5 and len(begun[-1][3]) == 100 and not any(game[1] for game in begun[:-len(after)])
    assert 0.2 < len(practice) / len(after) < 0.4 and abs(len(begun) - len(practice) - len(rows)) <= 2  # without rows
    assert all(game[0] in [source for _, _, source, _ in begun] for game in after if game[0].cleared)  # in turn


def test_search_goes_on_at_random_late_in_the_furthest_game_until_the_first_clear(begun, small, tmp_path, monkeypatch):
    monkeypatch.setattr(m.DQNAgent, "act", lambda self, states: np.zeros(len(states), int))  # the agent stands still
    small.clear_at, small.death_at = 190, 60
    m.run(m.Settings(search=0.3, patience=20, steps=2000, envs=2, seed=5), tmp_path / "run")
    before = [game for game in begun if not game[2].cleared]
    search = [game for game in before if game[0].practice]
    assert 0.15 < len(search) / len(before) < 0.45 and {game[0].noise for game in search} == {"random"}
    assert all(k == source.actions[:len(k)] and 0 < len(source.actions) - len(k) <= 40 for _, k, source, _ in search)
    assert (furthest := [game[2].furthest_x for game in before]) == sorted(furthest) and len(set(furthest)) > 3
    assert {game[0].noise for game in begun[len(before):]} == {"noop"}, "after the first clear the agent plays"


@pytest.mark.parametrize("search, mean, starts", [
    (0, 60, range(100)), (0.5, 5, range(40)), (0.5, 60, range(40, 80)), (0.5, 500, range(60, 100))])
def test_practice_begins_anywhere_in_the_game_or_with_search_where_own_games_end(search, mean, starts):
    agent, source = m.DQNAgent(m.Settings(search=search, practice=1.0)), mock.Mock(actions=[*range(100)], cleared=True)
    games = [m.next_episode(agent, source, [mean - 1, mean + 1]) for _ in range(1000)]
    assert {tuple(game.actions) for game in games if game.noise == "noop"} == {tuple(range(start)) for start in starts}


def test_several_stages_share_the_games_out_and_each_has_its_own_clear_to_practise(begun, small, tmp_path, monkeypatch):
    """Stage 1-1 is cleared at x = 85, 1-2 at 70. The third game is of stage 1-1 again."""
    stages = {"1-1": type("Far", (small,), {"clear_at": 85}), "1-2": type("Near", (small,), {"clear_at": 70})}
    flags = "--stage=1-1,1-2 --envs=3 --steps=2001 --practice=0.5 --eps-decay=1".split()
    monkeypatch.setattr(m, "make_env", lambda stage, _: stages[stage]())
    games = m.read_rows(train(tmp_path / "whole", *flags))
    assert {row["stage"] for row in games if row["cleared"]} == {"1-1", "1-2"}
    assert all((row["furthest_x"] >= {"1-1": 85, "1-2": 70}[row["stage"]]) == row["cleared"] for row in games)
    ends = [sum(game["furthest_x"] >= x for game in checkpoint(tmp_path / "whole")["games"][3:]) for x in (70, 85)]
    assert ends == [2, 1], "the last clears are kept by stage"
    firsts = [next(row["length"] for row in games if row["stage"] == stage) for stage in stages]
    assert {lengths[0] for *_, lengths in begun if 0 < len(lengths) < 100} == {*firsts}, "and so are the lengths"
    train(tmp_path / "parts", *flags, at=1500, stop=signal.SIGINT)
    call("--resume", tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_an_opening_is_played_before_the_game_and_not_learnt_from(small, tmp_path, monkeypatch):
    begun, learnt_from, begin, remember = [], [], m.begin, m.DQNAgent.remember

    def begin_and_note(env, episode):
        begun.append((len(episode.actions), *(made := begin(env, episode))))
        return made
    monkeypatch.setattr(m, "begin", begin_and_note)
    monkeypatch.setattr(m.DQNAgent, "remember", lambda agent, state, *rest, **env: learnt_from.append(
        state[-1, 0, 0]) or remember(agent, state, *rest, **env))
    m.run(m.Settings(steps=100, envs=1, train_noise="noop", practice=0), tmp_path / "run")
    assert len(learnt_from) == 100, "a step is one that is learnt from"
    assert len({idle for idle, _, _ in begun}) > 5
    for idle, state, info in begun[:-1]:
        assert round(state[-1, 0, 0] * 255) == (40 * 7 + idle * 13) % 251 and state[-1, 0, 0] in learnt_from
        assert info["x_pos"] == 40, "it has idled"


def test_a_game_that_stands_still_is_cut_off_and_that_is_not_remembered_as_death(small, tmp_path, monkeypatch):
    monkeypatch.setattr(m.DQNAgent, "act", lambda self, states: np.zeros(len(states), int))
    train(tmp_path / "run", *ALONE, "--patience", "5", "--steps", "60")
    assert [row["length"] for row in csv_of(tmp_path / "run")] == ["6"] * 10, "the first step sets the furthest x"
    assert np.bincount(checkpoint(tmp_path / "run")["memory"]["ends"].flatten())[1:].tolist() == [0, 10]


def test_the_bar_of_a_long_run_fits_into_80_columns(small, tmp_path, monkeypatch):
    bars, step, make = [], small.step, m.tqdm
    monkeypatch.setattr(m, "tqdm", lambda **more: bars.append(make(file=io.StringIO(), **more)) or bars[-1])
    monkeypatch.setattr(small, "step", lambda *args: (lambda state, _, *rest: (state, -2123.0, *rest))(*step(*args)))
    small.death_at = 3
    train(tmp_path / "run", *ALONE, "--envs", "2", "--steps", "330")
    call("--resume", tmp_path / "run", "--steps", "340")
    assert [(bar.n, bar.total) for bar in bars] == [(330, 330), (340, 340)]
    text = bars[0].format_meter(**{**bars[0].format_dict, "n": 390_123, "total": 400_000, "elapsed": 4000.0})
    assert len(text) <= 80 and all(word in text for word in ("390k/400k", "1:06:40<", "step/s", "cleared 0%", "ε 1.00"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_that_a_stopped_run_prints_continues_it(number, small, tmp_path, monkeypatch, capsys):
    handler = signal.getsignal(number)
    train(tmp_path / "a run", at=50, stop=number)
    assert signal.getsignal(number) == handler
    python, program, *argv = shlex.split(re.search(r"\S+ \S+ --resume .*", capsys.readouterr().out)[0])
    assert os.path.samefile(python, sys.executable) and os.path.samefile(program, m.__file__)
    save = m.save  # a Ctrl-C while the end is saved comes too late to stop the run
    monkeypatch.setattr(m, "save", lambda *args: save(*args) or args[1].steps == 300 and signal.raise_signal(number))
    assert m.main(argv) == 0 and checkpoint(tmp_path / "a run")["steps"] == 300
    ends_in_one_line(capsys, tmp_path / "a run", "finished", "--steps", steps=300)
    # Limits that were moved hold for the next command, too.
    call(*argv[-2:], "--steps", "900", "--episodes", "999", at=400, stop=number)
    assert m.main(argv) == 0 and checkpoint(tmp_path / "a run")["steps"] == 900
    assert '"episodes": 999,' in (tmp_path / "a run" / "settings.json").read_text()


def test_ctrl_c_ends_a_real_training_cleanly(tmp_path):
    with subprocess.Popen([sys.executable, "-u", m.__file__, *TINY, "--steps", "4000", "--out", "run"], cwd=tmp_path,
                          text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr.read(1)  # waits for the bar: from then on it plays
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=60)[1] and process.returncode == 130
    assert checkpoint(tmp_path / "run")["steps"] < 4000


def test_ctrl_c_twice_stops_at_once_and_keeps_the_last_checkpoint(folder, monkeypatch, capsys):
    before_act(monkeypatch, lambda agent: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    ends_in_one_line(capsys, folder, "stopped at once", code=130)


def test_two_programs_cannot_train_one_run_and_the_lock_writes_into_no_file(folder, capsys, tmp_path):
    with m.FileLock(folder / "lock"):
        ends_in_one_line(capsys, folder, "another program")
    (tmp_path / "other").write_text("of someone else")
    (folder / "lock").replace(tmp_path / "own")
    (folder / "lock").symlink_to(tmp_path / "other")
    ends_in_one_line(capsys, folder, "lock: ")
    assert (tmp_path / "other").read_text() == "of someone else"
    (tmp_path / "own").replace(folder / "lock")
    call("--resume", folder, "--steps", "100")


def test_a_loss_that_is_no_number_and_an_emulator_that_fails_keep_the_checkpoint(folder, small, monkeypatch, capsys):
    def nan(self, action, play=small.step):
        return (lambda state, _, *rest: (state, math.nan, *rest))(*play(self, action))
    for step, words in ((nan, "loss nan --lr"), (mock.Mock(side_effect=OSError("crash")), "emulator OSError crash")):
        monkeypatch.setattr(small, "step", step)
        ends_in_one_line(capsys, folder, *words.split())


def test_a_full_disk_keeps_the_checkpoint_before(tiny, tmp_path):
    """A real one: the system refuses to let files grow beyond 4 MB."""
    shutil.copytree(tiny, tmp_path / "run")
    before = kept(tmp_path / "run")
    done = subprocess.run([sys.executable, m.__file__, "--resume", "run", "--steps", "250"], cwd=tmp_path, text=True,
                          capture_output=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000)))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search("last.pt cannot be written.*untouched.*File too large$", done.stderr.strip())
    assert kept(tmp_path / "run") == before and not list((tmp_path / "run").glob("partial*"))


@pytest.mark.parametrize("where, name", [("fsync", ""), ("replace", "last.pt"), ("replace", "episodes.csv")])
def test_a_disk_that_fails_late_keeps_the_checkpoint_before(where, name, folder, capsys):
    def full(*args):
        if name in str(args[-1]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return works(*args)
    works = getattr(os, where)
    with mock.patch.object(os, where, full):
        ends_in_one_line(capsys, folder, "No space left on device", name, "untouched", steps=200)
    assert not list(folder.glob("partial*"))
    call("--resume", folder, "--steps", "200")
