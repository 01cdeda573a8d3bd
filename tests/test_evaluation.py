"""Section 6 of mario_ddqn.py: greedy games and the rate of clears, clips, the window, reward curves."""
import json
import math
import os
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, Toy, checkpoint, m
from PIL import Image

RIGHT = 1  # in the real game: into the first Goomba


def always(action):
    return lambda states: np.eye(5, dtype=np.float32)[[action] * len(states)]


def by_brightness(states):
    """Q-values that depend on the newest frame, so that one action of the noise's changes all that follows."""
    return np.eye(5, dtype=np.float32)[(states[:, -1, 40, 40] * 255).round().astype(int) % 5]


def games(q_values, episodes, noise="none", seed=0):
    return [(end, x, episode.total_reward, episode.furthest_x, tuple(episode.actions))
            for end, x, episode in m.play(q_values, m.Settings(), episodes, noise, seed)]


@pytest.fixture(scope="session")
def walker(tiny, tmp_path_factory):
    """A network file that always walks to the right."""
    content = checkpoint(tiny, "network.pt")
    content["local_net"] = {name: weight * 0 for name, weight in content["local_net"].items()}
    content["local_net"]["fc.2.bias"][RIGHT] = 1
    torch.save(content, path := tmp_path_factory.mktemp("walker") / "walker.pt")
    return path


def test_a_game_ends_cleared_or_dead_or_out_of_time(toy, monkeypatch):
    monkeypatch.setattr(m, "MAX_STEPS", 12)
    assert games(always(4), 1) == [("cleared", 103, 63.0, 103, (4,) * 7)]
    assert games(always(2), 1) == [("died", 64, 24.0, 64, (2,) * 12)]
    toy.death_at = 13
    assert games(always(1), 1) == [("out of time", 52, 12.0, 52, (1,) * 12)]
    toy.cut = 5
    assert games(always(1), 1) == [("out of time", 45, 5.0, 45, (1,) * 5)]


@pytest.mark.parametrize("noise", ["noop", "epsilon", "sticky"])
def test_games_depend_on_the_seed_and_not_on_the_number_of_threads(noise, toy, monkeypatch):
    def twenty(seed, cores):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        return games(by_brightness, 20, noise, seed)
    toy.death_at = 40
    many = twenty(7, 5)
    assert many == twenty(7, 1) == twenty(7, None) != twenty(8, 5) and len(set(many)) > 3
    assert many[:9] == games(by_brightness, 9, noise, 7), "a game's noise depends on its number alone"


def test_wilsons_interval():
    for k, n, low, high in ((90, 100, 0.8256, 0.9448), (0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (5, 10, 0.2366, 0.7634),
                            (1, 20, 0.0089, 0.2361), (100, 100, 0.9630, 1)):
        assert (got := m.wilson(k, n)) == pytest.approx((low, high), abs=5e-5) and got[0] <= k / n <= got[1]


@pytest.mark.parametrize("stage, flag", [("1-1", 3161), ("1-2", 3161), ("1-3", 2425), ("1-4", 2267)])
def test_the_network_that_comes_with_the_program_clears_its_level(stage, flag):
    """On the real game, without noise. Another processor may round its Q-values in another way; so far all cleared."""
    path, q_values, settings = m.load_network(None, stage)
    assert path.stat().st_size < 4e6
    ((end, x, episode),) = m.play(q_values, settings, 1, "none", 0)
    assert (end, episode.cleared) == ("cleared", True) and abs(x - flag) < 20 and len(episode.actions) < 500


def test_the_rate_of_clears_its_interval_and_where_games_were_lost(walker, tmp_path, monkeypatch, capsys):
    def play(q_values, settings, episodes, noise, seed):
        assert (episodes, noise, seed, settings.stage) == (100, "epsilon", 3, "1-1")
        return [(("out of time", "died", "cleared")[(k > 2) + (k > 9)], 3050 + k, None) for k in range(100)]
    monkeypatch.setattr(m, "play", play)
    out = tmp_path / "new" / "x.json"  # its folder is made
    assert m.main(["--evaluate", str(walker), "--noise", "epsilon", "--seed", "3", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result.pop("wilson_95") == pytest.approx([0.8256, 0.9448], abs=5e-5)
    lost = [["died", 3050 + k] for k in range(3, 10)] + [["out of time", 3050 + k] for k in range(3)]
    assert result == {"network": "walker.pt", "stage": "1-1", "noise": "epsilon", "seed": 3, "episodes": 100,
                      "cleared": 90, "lost": lost}
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("90 of 100", "83% to 94%", "7 × died at x = 3050 to 3099"))


def test_an_evaluation_goes_into_the_runs_folder_or_into_runs_and_shows_a_bar(tiny, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toy.clear_at = 0
    assert m.main(["--evaluate", shutil.copytree(tiny, "run"), "--noise", "sticky", "--episodes", "3"]) == 0
    assert "3/3" in (bar := capsys.readouterr().err.splitlines()[-1]) and "cleared=3" in bar
    for flags, code in ("run --stage 1-3", 0), ("", 0), ("--stage 1-3", 0), ("--stage 2-1", 2):  # 2-1: no such network
        assert m.main(["--evaluate", *flags.split()]) == code
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")} == {
        "run/settings.json", "run/evaluation-sticky.json", "run/evaluation-1-3-none.json",
        "runs/evaluation-mario_1-1-none.json", "runs/evaluation-mario_1-3-none.json"}
    assert json.loads((tmp_path / "runs/evaluation-mario_1-1-none.json").read_text())["episodes"] == 1
    assert '"mario_1-3.pt", "stage": "1-3"' in (tmp_path / "runs/evaluation-mario_1-3-none.json").read_text()
    assert "not a rate" in capsys.readouterr().out, "without noise all games are the same"


def test_the_settings_decide_which_game_is_trained_evaluated_and_watched(tmp_path, monkeypatch):
    asked, run = [], tmp_path / "run"
    monkeypatch.setattr(m, "RIGHT_ONLY", m.RIGHT_ONLY[:3])  # as in a fork with other buttons
    monkeypatch.setattr(m, "make_env", lambda *args: asked.append(args) or Toy())
    assert m.main([*TINY, "--envs=3", "--steps", "4", "--stage", "1-2,1-4", "--no-show-jump", "--out", str(run)]) == 0
    for flags in ([], ["--stage", "1-4"], ["--stage", "2-1"]):
        assert m.main(["--evaluate", str(run), *flags]) == 0
        assert m.main(["--watch", str(run), "--out", str(run / "x.gif"), *flags]) == 0
    assert asked == [(stage, False) for stage in "1-2 1-4 1-2 1-2 1-2 1-4 1-4 2-1 2-1".split()], "else the first"
    assert len(checkpoint(run, "network.pt")["local_net"]["fc.2.bias"]) == 3, "a Q-value for each list of buttons"


def test_a_game_is_shown_as_it_is_when_the_network_chooses_and_at_its_end(toy):
    seen, episode = [], m.Episode(np.random.default_rng(0))
    m.play_episode(toy(), always(4), episode, lambda picture, state, values, episode: seen.append(
        (int(picture[0, 0, 0]), int(values.argmax()), len(episode.actions), episode.cleared)))
    assert seen == [(40 + 9 * step, 4, step + 1, False) for step in range(7)] + [(103, 4, 7, True)]


@pytest.mark.parametrize("played, cleared, line", [(2, False, "orange"), (1, False, "red"), (2, True, "orange")])
def test_the_panel_shows_what_the_network_sees_thinks_and_does(played, cleared, line):
    colours = {"blue": (233, 180, 86), "orange": (0, 159, 230), "red": (80, 80, 255)}
    picture = np.random.default_rng(0).integers(0, 256, (240, 256, 4)).astype(np.uint8)
    state, points = np.arange(4, dtype=np.float32)[:, None, None] / 4 + np.zeros((84, 84), np.float32), np.arange(5.0)
    points[2], episode = 40, SimpleNamespace(actions=[played], cleared=cleared)
    panel = m.watch_panel(picture, state, points, [20, 40], episode)
    assert panel.shape == (672, 1280, 3) and panel.dtype == np.uint8
    np.testing.assert_array_equal(panel[:, :768], picture[8:232, :, :3].repeat(3, 0).repeat(3, 1))
    assert [int(panel[100, 840 + 122 * k, 0]) for k in range(4)] == pytest.approx([0, 64, 128, 191], abs=1)
    length = {name: [int((panel[250 + 38 * a, 970:1200] == colour).all(1).sum()) for a in range(5)]
              for name, colour in colours.items()}
    assert length["orange"][2] > 200 and length["blue"][2] == 0, "the chosen bar is the longest, in its own colour"
    assert 0 < length["blue"][0] < length["blue"][1] < length["blue"][4] < 30
    shown = {name for name, colour in colours.items() if (panel[445:480, 784:] == colour).all(2).any()}
    assert shown == {line}, "the line on what it does, or what the noise did"
    curve = (panel[540:660, 784:] == colours["blue"]).all(2).nonzero()[0]
    assert curve.min() == pytest.approx(10, abs=2) and curve.max() == pytest.approx(61, abs=2), "40 and 20 points"


def test_a_clip_is_every_second_panel_in_half_its_size(walker, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(m, "MAX_STEPS", 12)
    assert m.main(["--watch", str(walker), "--out", str(clip := tmp_path / "clip.gif")]) == 0
    assert "out of time at x = " in (out := capsys.readouterr().out) and "12 steps" in out and str(clip) in out
    env = m.make_env()
    picture = env.reset()[1]["picture"]
    with Image.open(clip) as film:
        assert (film.format, film.size, film.n_frames) == ("GIF", (640, 336), 7)
        for step in range(12):
            film.seek(step // 2)
            game = cv2.resize(picture[8:232, :, 2::-1], (384, 336))
            shown = np.array(film.convert("RGB"))[:, :384].astype(int)
            assert step % 2 or np.abs(shown - game).mean() < 14, "red is red"
            picture = env.step(RIGHT)[-1]["picture"]
    env.close()
    assert [path.name for path in tmp_path.iterdir()] == ["clip.gif"]


@pytest.fixture
def window(monkeypatch):
    """A window that is not there: the keys pressed in it (one each time it waits), and all that it showed."""
    window = SimpleNamespace(keys=[], delays=[], shown=[], closed_after=math.inf)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", lambda *_: None)
    monkeypatch.setattr(cv2, "imshow", lambda title, picture: window.shown.append(int(picture[0, 0, 0])))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: window.delays.append(delay) or (
        ord(window.keys.pop(0)) if window.keys else -1))
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: float(len(window.shown) < window.closed_after))
    return window


def test_the_games_watched_are_those_of_the_seed_and_the_values_are_points(window, walker, toy, monkeypatch, capsys):
    toy.death_at, points, panel = 40, set(), m.watch_panel
    monkeypatch.setattr(m, "watch_panel", lambda *args: points.add(round(float(args[2].max()))) or panel(*args))
    assert m.main(["--watch", str(walker), "--noise", "epsilon", "--episodes", "3", "--seed", "4"]) == 0
    told = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert told == [f"{end} at x = {x}, return {total:.0f}, {len(actions)} steps"
                    for end, x, total, _, actions in games(always(RIGHT), 3, "epsilon", 4)] and len(set(told)) > 1
    assert points == {150}, "the network says 1, in units of the reward's scale"
    assert window.delays.count(2000) == 3, "each game's end stays"


@pytest.mark.parametrize("keys, closed, shown", [("..q", 9, 3), ("..\x1b", 9, 3), ("", 3, 3), ("." * 13 + "q", 99, 13)])
def test_the_window_shows_games_until_it_is_closed(keys, closed, shown, window, walker, toy, capsys):
    window.keys, window.closed_after = list(keys), closed
    assert m.main(["--watch", str(walker), "--episodes", "2"]) == 0 and capsys.readouterr().err == ""
    assert window.shown == [*range(40, 40 + shown)]


def test_the_keys_pause_step_and_set_the_speed(window):
    look = m.open_window()
    for number, (keys, waits) in enumerate([("1", 1), (" ..s", 4), ("..s", 3), (". ", 2), ("4", 1), ("", 1)], 1):
        window.keys = list(keys)
        look(np.full((672, 1280, 3), number, np.uint8))
        assert len(window.delays) == waits and window.keys == [], "it waits no longer than it has to"
        last = window.delays[-1]
        window.delays.clear()
    assert window.shown == [1, 2, 3, 4, 5, 6] and last == 10, "the fastest"


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_a_plot_has_the_format_that_its_name_ends_in(ending, tiny, tmp_path):
    other, out = shutil.copytree(tiny, tmp_path / "a$x^$b"), tmp_path / "new" / f"both.{ending}"  # no formula
    assert m.main(["--plot", str(tiny), str(other), "--out", str(out)]) == 0
    assert out.read_bytes()[:5] == {"png": b"\x89PNG\r", "svg": b"<?xml", "pdf": b"%PDF-"}[ending]


def test_the_curves_are_those_of_the_table(tmp_path, monkeypatch):
    lines, folders = [], [tmp_path / "one", tmp_path / "two"]
    for stages, folder in zip((["1-1"], ["1-1", "1-2"]), folders, strict=True):
        folder.mkdir()
        m.write_rows(folder, [{**dict.fromkeys(m.COLUMNS, 0), "stage": stage, "env_steps": steps, "return": points,
                               "cleared": cleared} for stage in stages
                              for steps, points, cleared in ((30, 10, 0), (50, 40, 1), (90, 70, 0))])
    monkeypatch.setattr(m.Figure, "savefig", lambda figure, *_, **__: lines.extend(figure.axes[0].lines))
    m.plot_rewards(folders[:1], tmp_path / "x.png", window=2)
    drawn = [np.array(line.get_data()).tolist() for line in lines]
    assert drawn == [[[30, 50, 90], [10, 25, 55]], [[30, 50, 90], [10, 40, 70]], [[50], [-150]]]  # mean, games, clears
    m.plot_rewards(folders, tmp_path / "x.png", window=2)
    named = [line.get_label() for line in (lines[0], *lines[3::2])]  # beside other curves without the games
    assert named == [f"{name} (1 clears)" for name in ("one, 1-1", "one, 1-1", "two, 1-1", "two, 1-2")]
