"""What mario_ddqn.py promises. Every oracle is written here a second time, plainly: the wrappers frame by frame,
a replay memory that keeps whole float transitions, targets and losses by hand, tasks whose Q-values are known."""

import csv
import fcntl
import hashlib
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter, deque
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mario_ddqn as m
from mario_ddqn import RIGHT_ONLY, DQNAgent, DQNSolver, ReplayMemory, main, parse_args

PROGRAM = Path(m.__file__).resolve()
gym, JoypadSpace = m.gym, m.JoypadSpace
torch.set_num_threads(1)
RULES = ("single", "tutorial", "hasselt")
RIGHT, RUN = 1, 3  # both walk into the first Goomba: the shortest real episodes there are


def once(tmp_path_factory, name, make):
    """A folder that `make(folder)` fills, once for all of pytest's workers."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / f"once-{name}"
    with open(root / f"once-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial_folder = folder.with_name(f"making-{name}")
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir()
            make(partial_folder)
            partial_folder.rename(folder)
    return folder


def bare_game():
    return m.make_game("1-1")


def colours(stack):
    """uint8 -> the float32 that ScaledFloatFrame makes of it."""
    return np.asarray(stack).astype(np.float32) / np.float32(255)


# ===== 1. The wrappers, beside plain ones

def plain_84(rgb):
    """(240, 256, 3) uint8 in RGB -> (84, 84) uint8."""
    grey = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (84, 110), interpolation=cv2.INTER_AREA)[18:102]


class PlainGame:
    """The definition of a state and a reward, one thing after the other, every frame copied."""

    def __init__(self):
        self.game = JoypadSpace(bare_game(), RIGHT_ONLY)

    def reset(self):
        self.raw = [self.game.reset()[0].copy()]  # every frame of the episode's last two steps
        self.small = [np.zeros((84, 84), np.uint8)] * 3 + [plain_84(self.raw[0])]
        return self.state()

    def step(self, action):
        self.rewards = []
        for _ in range(4):
            frame, reward, terminated, truncated, info = self.game.step(action)
            self.raw.append(frame.copy())
            self.rewards.append(reward)
            if terminated or truncated:
                break
        self.raw = self.raw[-4:]
        self.brightest = np.maximum(self.raw[-2], self.raw[-1])
        self.small.append(plain_84(self.brightest))
        return self.state(), sum(self.rewards), terminated, truncated, info

    def state(self):
        return colours(np.stack(self.small[-4:]))


class Tap(gym.Wrapper):
    """Lets everything through and keeps a copy of the last observation."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.seen = np.array(obs)
        return obs, info

    def step(self, action):
        result = self.env.step(action)
        self.seen = np.array(result[0])
        return result


LAYERS = ("MaxAndSkipEnv", "ProcessFrame84", "ImageToPyTorch", "BufferWrapper", "ScaledFloatFrame")


@pytest.fixture(scope="module")
def trace():
    """Some 70 real steps with two deaths, in lock-step with PlainGame: what came out of every wrapper, and the
    plain frames. The wrappers stand in make_env's order with a Tap on each; JoypadSpace comes last."""
    env, taps = bare_game(), {}
    for name in LAYERS:
        env = taps[name] = Tap(getattr(m, name)(env))
    env, plain, steps = JoypadSpace(env, RIGHT_ONLY), PlainGame(), []

    def keep(reward, start, **more):
        seen = {name: tap.seen for name, tap in taps.items()}
        steps.append(SimpleNamespace(**seen, **more, reward=reward, start=start, small=plain.small[-1]))

    for action in (RIGHT, RUN):
        env.reset()
        plain.reset()
        keep(0.0, True, brightest=plain.raw[-1], plain_reward=0.0, end=(False, False))
        terminated = truncated = False
        while not (terminated or truncated):
            _, reward, terminated, truncated, info = env.step(action)
            _, plain_reward, *end, plain_info = plain.step(action)
            assert info["x_pos"] == plain_info["x_pos"]
            keep(reward, False, brightest=plain.brightest, plain_reward=plain_reward, end=(terminated, truncated))
            assert [terminated, truncated] == end
    env.close()
    assert sum(step.start for step in steps) == 2 and sum(step.end[0] for step in steps) == 2 and len(steps) > 60
    return steps


def test_max_and_skip_shows_the_maximum_of_the_last_two_frames_of_the_real_game(trace):
    for step in trace:
        assert step.MaxAndSkipEnv.shape == (240, 256, 3) and step.MaxAndSkipEnv.dtype == np.uint8
        np.testing.assert_array_equal(step.MaxAndSkipEnv, step.brightest)


def test_max_and_skip_sums_the_rewards_of_its_frames(trace):
    assert [step.reward for step in trace] == [step.plain_reward for step in trace]
    assert min(step.reward for step in trace) < 0 < max(step.reward for step in trace)


class Screen(gym.Env):
    """A game that draws into one place over and over, as the emulator does. Frame k has its own colours, pays
    10**k, and frame `last` ends the episode."""

    observation_space = gym.spaces.Box(0, 255, (240, 256, 3), np.uint8)
    action_space = gym.spaces.Discrete(256)

    def __init__(self, last=None, truncates=False):
        self.last, self.truncates, self.seen_actions = last, truncates, []
        self.buffer = np.zeros((240, 256, 4), np.uint8)

    def picture(self, k):
        return np.random.default_rng(k).integers(0, 256, (240, 256, 3), dtype=np.uint8)  # RGB

    def draw(self):
        self.buffer[:, :, 2::-1] = self.picture(self.frame)
        return self.buffer[:, :, ::-1][:, :, 1:]

    def reset(self, **kwargs):
        self.frame = 0
        return self.draw(), {}

    def step(self, action):
        assert self.last is None or self.frame < self.last, "stepped after the end"
        self.frame += 1
        self.seen_actions.append(action)
        end = self.frame == self.last
        return self.draw(), 10.0 ** self.frame, end and not self.truncates, end and self.truncates, {"k": self.frame}


def test_max_and_skip_repeats_the_action_for_four_frames():
    game = Screen()
    env = m.MaxAndSkipEnv(game)
    env.reset()
    env.step(7)
    _, reward, terminated, truncated, info = env.step(9)
    assert game.seen_actions == [7] * 4 + [9] * 4
    assert reward == sum(10.0 ** k for k in (5, 6, 7, 8)) and info == {"k": 8} and not terminated and not truncated


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("last", range(1, 10))
def test_an_episode_that_ends_inside_the_skip_stops_there(last, truncates):
    game = Screen(last, truncates)
    env = m.MaxAndSkipEnv(game)
    first, _ = env.reset()
    np.testing.assert_array_equal(first, game.picture(0))
    terminated = truncated = False
    while not (terminated or truncated):
        begin = game.frame
        obs, reward, terminated, truncated, info = env.step(0)
    assert game.frame == last and info == {"k": last} and (terminated, truncated) == (not truncates, truncates)
    assert reward == sum(10.0 ** k for k in range(begin + 1, last + 1))
    np.testing.assert_array_equal(obs, np.maximum(game.picture(last - 1), game.picture(last)))
    first, _ = env.reset()  # nothing of the old episode shows in the new one
    np.testing.assert_array_equal(first, game.picture(0))


def test_an_observation_of_max_and_skip_stays_as_it_is_when_the_game_goes_on():
    env = m.MaxAndSkipEnv(Screen())
    kept = [env.reset()[0]]
    kept += [env.step(0)[0] for _ in range(3)]
    copies = [np.array(obs) for obs in kept]
    env.step(0)
    env.reset()
    for obs, copy in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(obs, copy)


def test_process_frame_84_equals_the_plain_grey_and_resize_on_real_frames(trace):
    for step in trace:
        assert step.ProcessFrame84.shape == (84, 84, 1) and step.ProcessFrame84.dtype == np.uint8
        np.testing.assert_array_equal(step.ProcessFrame84[:, :, 0], plain_84(step.brightest))


def area_weights(n_in, n_out):
    """(n_out, n_in): the share of every source pixel in a target pixel; rows sum to 1."""
    edges = np.arange(n_out + 1) * n_in / n_out
    overlap = np.minimum(edges[1:, None], np.arange(1, n_in + 1)) - np.maximum(edges[:-1, None], np.arange(n_in))
    return overlap.clip(0) * n_out / n_in


def test_process_frame_84_is_the_area_average_of_the_weighted_colours_within_one_level(trace):
    down, across = area_weights(240, 110), area_weights(256, 84)
    np.testing.assert_allclose(down.sum(1), 1)
    for step in trace[::5]:
        grey = np.round(step.brightest @ np.array([0.299, 0.587, 0.114]))
        expected = (down @ grey @ across.T)[18:102]
        assert np.abs(step.ProcessFrame84[:, :, 0] - expected).max() <= 1.01


def test_process_frame_84_weighs_red_green_and_blue():
    wrapper = m.ProcessFrame84(Screen())
    for red, green, blue in np.random.default_rng(0).integers(0, 256, (40, 3)).tolist() + [[255, 0, 0], [0, 0, 255]]:
        frame = np.full((240, 256, 3), (red, green, blue), np.uint8)
        grey = round(0.299 * red + 0.587 * green + 0.114 * blue)
        assert np.abs(wrapper.observation(frame).astype(int) - grey).max() <= 1


def test_process_frame_84_does_the_same_to_a_frame_from_anywhere(trace):
    wrapper = m.ProcessFrame84(Screen())
    frame = trace[20].brightest
    padded = np.zeros((250, 300, 3), np.uint8)
    padded[3:243, 5:261] = frame
    for same in (frame, frame.copy(), np.asfortranarray(frame), padded[3:243, 5:261]):
        np.testing.assert_array_equal(wrapper.observation(same)[:, :, 0], plain_84(frame))


def test_process_frame_84_keeps_rows_18_to_101_of_110():
    frame = np.zeros((240, 256, 3), np.uint8)
    for row in range(110):  # one bright line in the small picture at a time, then look where it comes out
        lines = slice(math.ceil(row * 240 / 110), math.ceil((row + 1) * 240 / 110))
        frame[:] = 0
        frame[lines] = 255
        out = m.ProcessFrame84(Screen()).observation(frame)[:, :, 0].mean(1)
        brightest = int(out.argmax()) + 18 if out.max() > 127 else None
        assert brightest == (row if 18 <= row <= 101 else None)


def test_image_to_pytorch_puts_the_channel_first(trace):
    for step in trace:
        assert step.ImageToPyTorch.shape == (1, 84, 84)
        np.testing.assert_array_equal(step.ImageToPyTorch[0], step.ProcessFrame84[:, :, 0])
    picture = np.arange(84 * 84 * 1, dtype=np.uint32).reshape(84, 84, 1).astype(np.uint8)
    np.testing.assert_array_equal(m.ImageToPyTorch(Screen()).observation(picture)[0], picture[:, :, 0])


def test_buffer_wrapper_holds_the_last_four_frames_and_black_before_the_first(trace):
    since = None
    for step in trace:
        since = [step.small] if step.start else [*since, step.small]
        expected = ([np.zeros((84, 84), np.uint8)] * 4 + since)[-4:]
        assert step.BufferWrapper.shape == (4, 84, 84) and step.BufferWrapper.dtype == np.uint8
        np.testing.assert_array_equal(step.BufferWrapper, np.stack(expected))
    starts = [step for step in trace if step.start]
    assert all(not step.BufferWrapper[:3].any() and step.BufferWrapper[3].any() for step in starts)


class Counting(gym.Env):
    """Frames (1, 84, 84) full of 10, 11, 12, …"""

    observation_space = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(5)

    def reset(self, **kwargs):
        self.value = 10
        return np.full((1, 84, 84), 10, np.uint8), {}

    def step(self, action):
        self.value += 1
        return np.full((1, 84, 84), self.value, np.uint8), 0.0, False, False, {}


def test_stacks_do_not_share_memory():
    env = m.BufferWrapper(Counting())
    stacks = [env.reset()[0]] + [env.step(0)[0] for _ in range(6)] + [env.reset()[0], env.step(0)[0]]
    frames = [[0, 0, 0, 10], [0, 0, 10, 11], [0, 10, 11, 12], [10, 11, 12, 13], [11, 12, 13, 14], [12, 13, 14, 15],
              [13, 14, 15, 16], [0, 0, 0, 10], [0, 0, 10, 11]]
    for k, stack in enumerate(stacks):
        assert stack[:, 40, 40].tolist() == frames[k] and stack[:, 0, 0].tolist() == frames[k]
        assert not any(np.shares_memory(stack, other) for other in stacks[:k])


def test_scaled_float_frame_divides_by_255_in_float32(trace):
    for step in trace:
        assert step.ScaledFloatFrame.dtype == np.float32
        np.testing.assert_array_equal(step.ScaledFloatFrame, colours(step.BufferWrapper))
    every = np.arange(256, dtype=np.uint8).repeat(441).reshape(4, 84, 336)[:, :, :84]
    out = m.ScaledFloatFrame(Counting()).observation(every)
    assert out.dtype == np.float32 and np.array_equal(out, colours(every))


def test_make_env_applies_the_wrappers_in_the_tutorials_order():
    env, names = m.make_env(), []
    layer = env
    while isinstance(layer, gym.Wrapper):
        names.append(type(layer).__name__)
        layer = layer.env
    env.close()
    assert names[:6] == ["JoypadSpace", *reversed(LAYERS)]
    assert names.count("JoypadSpace") == 1 and not set(LAYERS) & set(names[6:])


def test_the_whole_chain_equals_the_plain_one_over_real_steps():
    env, plain, rng = m.make_env(), PlainGame(), np.random.default_rng(3)
    np.testing.assert_array_equal(env.reset()[0], plain.reset())
    deaths = action = 0
    for step in range(180):
        if step < 30:
            action = RUN  # dies first, so that an end and a new start are surely among the steps
        elif rng.random() < 0.3:
            action = int(rng.integers(5))
        state, reward, terminated, truncated, info = env.step(action)
        plain_state, plain_reward, *plain_rest = plain.step(action)
        assert state.dtype == np.float32 and np.array_equal(state, plain_state)
        assert reward == plain_reward and [terminated, truncated, info] == plain_rest
        if terminated or truncated:
            deaths += 1
            np.testing.assert_array_equal(env.reset()[0], plain.reset())
    env.close()
    assert deaths >= 1


# ===== 2. States, rewards, determinism

RECORDED, LONGEST = 5000, 150  # an episode of LONGEST steps is cut there, as a time limit would cut it


def record_steps(folder):
    """5,000 steps of four real games with held random actions."""
    games, rng = m.Emulators(4), np.random.default_rng(11)
    stacks = np.lib.format.open_memmap(folder / "stacks.npy", "w+", np.uint8, (RECORDED + 1000, 4, 84, 84))
    table, exact, count = [], [], 0

    def keep(state):
        nonlocal count
        stacks[count] = np.rint(state * 255)
        exact.append(state.dtype == np.float32 and state.min() >= 0 and state.max() <= 1
                     and np.array_equal(colours(stacks[count]), state))
        count += 1
        return count - 1

    at, length = [keep(games.reset(e)) for e in range(4)], [0] * 4
    held, left = [0] * 4, [0] * 4
    while len(table) < RECORDED:
        for e in range(4):
            if left[e] == 0:
                held[e], left[e] = int(rng.integers(5)), int(rng.integers(1, 17))
            left[e] -= 1
        for e, (state, reward, terminated, truncated, _) in enumerate(games.step(held)):
            length[e] += 1
            cut = length[e] >= LONGEST and not terminated
            after = keep(state)
            table.append((e, at[e], after, held[e], reward, terminated, truncated or cut))
            at[e] = after
            if terminated or truncated or cut:
                at[e], length[e], left[e] = keep(games.reset(e)), 0, 0
    games.close()
    stacks.flush()
    np.savez(folder / "table.npz", table=np.array(table, float), exact=np.array(exact))


class Steps:
    """The recorded steps, in the order of play. Iterating gives the arguments of ReplayMemory.push."""

    def __init__(self, folder):
        self.stacks = np.load(folder / "stacks.npy", mmap_mode="r")
        with np.load(folder / "table.npz") as saved:
            self.table, self.exact = saved["table"], saved["exact"]

    def rows(self, start=0, stop=None):
        for e, before, after, action, reward, terminated, truncated in self.table[start:stop].tolist():
            yield (colours(self.stacks[int(before)]), int(action), reward, colours(self.stacks[int(after)]),
                   bool(terminated), bool(truncated), int(e))


@pytest.fixture(scope="session")
def steps(tmp_path_factory):
    return Steps(once(tmp_path_factory, "steps", record_steps))


def test_a_state_is_four_frames_of_float32_between_0_and_1(steps):
    env = m.make_env()
    first, _ = env.reset()
    assert env.action_space.n == 5 == len(RIGHT_ONLY)
    assert env.observation_space.shape == (4, 84, 84) and env.observation_space.dtype == np.float32
    for state in (first, env.step(0)[0]):
        assert state.shape == (4, 84, 84) and state.dtype == np.float32 and 0 <= state.min() < state.max() <= 1
    env.close()
    assert steps.exact.all() and len(steps.exact) > RECORDED  # and so is every recorded one


def test_the_recorded_games_hold_deaths_and_cuts_in_several_emulators(steps):
    ends = steps.table[:, 5:] > 0
    assert len(steps.table) == RECORDED and set(steps.table[:, 0]) == {0, 1, 2, 3}
    assert ends[:, 0].sum() > 10 and ends[:, 1].sum() > 3 and not ends.all(1).any()


def test_the_rewards_of_a_fixed_sequence_are_the_bare_games_rewards():
    env, bare, rng = m.make_env(), bare_game(), np.random.default_rng(5)
    buttons = {"NOOP": 0, "A": 1, "B": 2, "right": 128}
    deaths = 0
    for sequence in ([RUN] * 60, rng.integers(5, size=50).tolist(), [RIGHT] * 60):
        env.reset()
        bare.reset()
        for action in sequence:
            _, reward, terminated, truncated, _ = env.step(action)
            total, over = 0.0, False
            for _ in range(4):
                if not over:
                    _, paid, over, _, _ = bare.step(sum(buttons[name] for name in RIGHT_ONLY[action]))
                    total += paid
            assert reward == total and terminated == over and not truncated
            if terminated:
                deaths += 1
                break
    env.close()
    bare.close()
    assert deaths >= 2


def test_the_same_actions_give_the_same_states_and_rewards_again(steps):
    """One game of its own replays what an emulator among four threads did."""
    for e in (0, 3):
        rows = steps.table[steps.table[:, 0] == e]
        first_end = int(np.argmax(rows[:, 5:].any(1))) + 1
        env = m.make_env()
        state, _ = env.reset()
        for _, before, after, action, reward, terminated, _ in rows[:min(first_end, 80)].tolist():
            np.testing.assert_array_equal(state, colours(steps.stacks[int(before)]))
            state, r, end, _, _ = env.step(int(action))
            assert r == reward and end == bool(terminated)
            np.testing.assert_array_equal(state, colours(steps.stacks[int(after)]))
        env.close()


def test_every_episode_starts_in_the_same_state(steps):
    starts = {steps.stacks[0].tobytes()}
    ends = steps.table[:, 5:].any(1)
    after = {int(row[2]) for row in steps.table[ends]}
    firsts = {int(row[1]) for row in steps.table} - {int(row[2]) for row in steps.table} - after
    starts |= {steps.stacks[k].tobytes() for k in firsts}
    assert len(firsts) > 10 and len(starts) == 1


def test_a_start_prints_nothing_on_stderr():
    code = "import mario_ddqn as m; env = m.make_env(); env.reset(); env.step(1); env.close(); print('played')"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM.parent, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["played"], "")


class Toy(gym.Env):
    """A game of a dozen steps that looks like the real one from above: x grows with the action, the frame's
    brightness tells x and t, 12 steps are death, x beyond 100 clears the level. `cut`: truncated then."""

    observation_space = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(5)
    cut, clear_at, death_at = None, 100, 12

    def frame(self):
        return np.full((1, 84, 84), (self.x * 7 + self.t * 13) % 251, np.uint8)

    def reset(self, **kwargs):
        self.x, self.t = 40, 0
        return self.frame(), {}

    def step(self, action):
        moved = (0, 1, 2, 4, 9)[action]
        self.x, self.t = self.x + moved, self.t + 1
        clear = self.x >= self.clear_at
        return (self.frame(), float(moved), clear or self.t >= self.death_at, self.t == self.cut,
                {"x_pos": self.x, "flag_get": clear})


@pytest.fixture
def toy(monkeypatch):
    """Toy in place of the emulator, for what does not depend on the game."""
    monkeypatch.setattr(m, "make_env", lambda *_: m.ScaledFloatFrame(m.BufferWrapper(Toy())))
    return Toy


def test_show_jump_draws_a_white_line_exactly_while_the_jump_button_is_down():
    """And changes nothing else: the same actions without it give the same states below the line."""
    shown, plain, actions = m.make_env(show_jump=True), m.make_env(), [1, 2, 2, 3, 4, 4, 0, 2, 1]
    states = [(shown.reset()[0], plain.reset()[0])]
    states += [(shown.step(a)[0], plain.step(a)[0]) for a in actions]
    for (with_line, without), action in zip(states, [0, *actions], strict=True):
        down = "A" in RIGHT_ONLY[action]
        assert (with_line[-1, :4] == 1).all() == down and not (without[-1, :4] == 1).all()
        np.testing.assert_array_equal(with_line[:, 4:], without[:, 4:])
        np.testing.assert_array_equal(with_line[-1, :4] if not down else 0, without[-1, :4] if not down else 0)
    shown.step(2)
    assert not (shown.reset()[0] == 1).any(), "a new episode begins with the button up"


def test_the_settings_decide_whether_training_exams_and_evaluation_show_the_jump(toy, tmp_path, monkeypatch):
    asked, make = [], m.make_env
    monkeypatch.setattr(m, "make_env", lambda stage, show_jump: (asked.append(show_jump), make())[1])
    flags = ["--steps", "40", "--eval-every", "40", "--eval-episodes", "2"]
    for answer, flag in ((True, []), (False, ["--show-jump", "no"]), (False, ["--preset", "tutorial"])):
        folder = tmp_path / str(len(asked))
        train(folder, *flags, *flag)
        assert main(["--evaluate", str(folder), "--episodes", "1"]) == 0
        assert set(asked) == {answer} and len(asked) >= 5
        asked.clear()


def test_emulators_step_only_the_games_they_are_asked_to_and_in_that_order(toy):
    games, alone = m.Emulators(3), m.make_env()
    for e in range(3):
        games.reset(e)
    alone.reset()
    first = [alone.step(2), alone.step(4)]
    (state_2, reward_2, *_), (state_0, reward_0, *_) = games.step([2, 1], [2, 0])
    assert (reward_2, reward_0) == (2, 1) and np.array_equal(state_2, first[0][0])
    np.testing.assert_array_equal(games.step([4], [2])[0][0], first[1][0])
    assert [result[1] for result in games.step([0, 1, 4])] == [0, 1, 9]
    games.close()


# ===== 3. The replay memory

class NaiveMemory:
    """Every place holds a whole float transition, or None where an episode ended; n-step as one would say it."""

    def __init__(self, capacity, n_envs):
        self.places = [deque(maxlen=math.ceil(capacity / n_envs)) for _ in range(n_envs)]

    def push(self, state, action, reward, next_state, terminal, truncated=False, env=0):
        places = self.places[env]
        if not places or places[-1].over:
            places.append(SimpleNamespace(age=0, transition=None, over=False))
        places[-1].transition = (state, action, reward, next_state, terminal, truncated)
        places.append(SimpleNamespace(age=places[-1].age + 1, transition=None, over=terminal or truncated))

    def transitions(self, n_step, gamma):
        """Every transition it can still tell: (state, action, return, next_state, terminal, discount)."""
        for places in map(list, self.places):
            for k, place in enumerate(places):
                if place.transition is None or k < min(place.age, 3):  # a frame of its state is overwritten
                    continue
                state, action, *_ = place.transition
                total, over = 0.0, False
                for i in range(n_step):
                    if places[k + i].transition is None:  # not played yet
                        break
                    _, _, reward, next_state, terminal, truncated = places[k + i].transition
                    total += gamma ** i * reward
                    over = terminal or truncated
                    if over:
                        break
                if over or i == n_step - 1 and places[k + i].transition:
                    yield state, action, total, next_state, float(terminal), gamma ** (i + 1)


class Keys:
    """A short name for a transition: the same if and only if the transition is, bit for bit, in float32."""

    def __init__(self):
        self.floats, self.bytes = {}, {}

    def state(self, state):
        if state.dtype == np.uint8:  # the memory's: as float32, it must be what the environment gave
            raw = state.tobytes()
            if raw not in self.bytes:
                self.bytes[raw] = self.state(colours(state))
            return self.bytes[raw]
        return self.floats.setdefault(state.tobytes(), len(self.floats))

    def __call__(self, state, action, reward, next_state, terminal, discount):
        return (self.state(state), int(action), float(np.float32(reward)), self.state(next_state), float(terminal),
                float(np.float32(discount)))


def everything_sampled(memory, keys, n_step, gamma, wanted, rng):
    """The set of the keys of `wanted` × (ln wanted + 9) samples: enough to see every place (all but surely)."""
    seen = set()
    for _ in range(math.ceil(wanted * (math.log(wanted) + 9) / 256)):
        seen |= {keys(*row) for row in zip(*memory.sample(256, rng, n_step, gamma), strict=True)}
    return seen


def test_frames_stored_once_give_the_transitions_of_a_memory_of_whole_floats(steps):
    """Half full, just wrapped and wrapped many times; exactly the valid places, every one of them."""
    memory, naive, keys, rng = ReplayMemory(900, 4), NaiveMemory(900, 4), Keys(), np.random.default_rng(0)
    for done, step in enumerate(steps.rows(), 1):
        memory.push(*step)
        naive.push(*step)
        if done in (450, 910, RECORDED):
            keys.floats.clear()
            keys.bytes.clear()
            for n_step, gamma in ((1, 0.9), (5, 0.9)):
                expected = {keys(*row) for row in naive.transitions(n_step, gamma)}
                assert len(expected) > 350
                assert everything_sampled(memory, keys, n_step, gamma, len(expected), rng) == expected
    assert {key[4] for key in expected} == {0, 1}  # of the last check: ends at every distance are among them
    assert {key[5] for key in expected} == {float(np.float32(0.9 ** k)) for k in range(1, 6)}


def test_recall_gives_the_remembered_steps_as_floats(steps):
    agent = DQNAgent((4, 84, 84), 5, memory=600, n_envs=4, n_step=5, gamma=0.9, batch=128, reward_scale=0.5)
    naive, keys = NaiveMemory(600, 4), Keys()
    for state, action, reward, next_state, terminal, truncated, e in steps.rows(0, 1500):
        agent.remember(state, action, reward, next_state, terminal, truncated, env=e)
        naive.push(state, action, 0.5 * reward, next_state, terminal, truncated, env=e)
    expected = {keys(*row) for row in naive.transitions(5, 0.9)}
    for _ in range(3):
        batch = agent.recall()
        states = (128, 4, 84, 84)
        assert [tensor.shape for tensor in batch] == [states, (128,), (128,), states, (128,), (128,)]
        assert [tensor.dtype for tensor in batch] == [torch.float32, torch.int64] + [torch.float32] * 4
        rows = [keys(*row) for row in zip(*(tensor.numpy() for tensor in batch), strict=True)]
        assert set(rows) <= expected and len(set(rows)) > 80


def frames_of(e, k):
    """Frame k of emulator e in a small world: (8, 8) uint8 that says e and k, never black."""
    frame = np.full((8, 8), 200 + e, np.uint8)
    frame[0, 0], frame[0, 1] = k // 200 + 1, k % 200 + 1
    return frame


class Small:
    """A memory of 8×8 frames, fed with episodes whose frames, actions and rewards carry their number."""

    def __init__(self, capacity, n_envs=1):
        self.memory = ReplayMemory(capacity, n_envs, 4, (8, 8))
        self.frame, self.step = [0] * n_envs, [0] * n_envs

    def play(self, length, end="terminated", e=0):
        """Step number j pays j; its state ends with frame `frame`."""
        stack = [np.zeros((8, 8), np.uint8)] * 3 + [frames_of(e, self.frame[e])]
        for t in range(length):
            before = colours(np.stack(stack[-4:]))
            self.frame[e] += 1
            stack.append(frames_of(e, self.frame[e]))
            over = end if t == length - 1 else None
            self.memory.push(before, self.step[e] % 5, float(self.step[e]), colours(np.stack(stack[-4:])),
                             over == "terminated", over == "truncated", e)
            self.step[e] += 1
        self.frame[e] += 1 if end else 0
        return self

    def sample(self, count, n_step=1, gamma=1.0, seed=0):
        return self.memory.sample(count, np.random.default_rng(seed), n_step, gamma)


def number(stack):
    """(4, 8, 8) -> the numbers of its frames, None for black."""
    return [None if not frame.any() else (int(frame[0, 0]) - 1) * 200 + int(frame[0, 1]) - 1 for frame in stack]


def test_one_transition_comes_back_as_it_was():
    small = Small(20).play(1)
    states, actions, rewards, next_states, terminals, discounts = small.sample(3, gamma=0.9)
    assert states.dtype == next_states.dtype == np.uint8 and states.shape == (3, 4, 8, 8)
    assert (actions.dtype, rewards.dtype, terminals.dtype, discounts.dtype) == (np.int64, *[np.float32] * 3)
    assert [number(s) for s in states] == [[None, None, None, 0]] * 3
    assert [number(s) for s in next_states] == [[None, None, 0, 1]] * 3
    assert actions.tolist() == [0] * 3 and rewards.tolist() == [0] * 3 and terminals.tolist() == [1] * 3


@pytest.mark.parametrize("capacity", [8, 13, 29])
def test_no_sample_holds_an_overwritten_frame_or_an_episodes_last_one(capacity):
    small, lengths = Small(capacity), [5, 1, 2, 9, 3, 1, 4, 30, 2, 2]
    for length in lengths:
        small.play(length)
        states, actions, rewards, next_states, *_ = small.sample(300)
        for state, action, reward, next_state in zip(states, actions, rewards, next_states, strict=True):
            frames, after = number(state), number(next_state)
            real = [k for k in frames if k is not None]
            assert frames == [None] * (4 - len(real)) + list(range(real[-1] - len(real) + 1, real[-1] + 1))
            assert after[:3] == frames[1:] and after[3] == frames[3] + 1
            assert action == reward % 5
            oldest = small.frame[0] - capacity  # numbers below are gone
            assert real[0] >= oldest
        assert small.frame[0] >= rewards.max() >= small.step[0] - length  # the newest episode is among them


@pytest.mark.parametrize("capacity", [9, 26])
def test_at_every_moment_the_same_transitions_as_in_a_memory_of_whole_floats(capacity):
    """Two small rings of small frames that go round a dozen times, checked after each step, with the step's end
    open or not; rings so small that marks of overwritten episodes lie everywhere."""
    memory, naive, keys = ReplayMemory(capacity, 2, 4, (8, 8)), NaiveMemory(capacity, 2), Keys()
    rng, count, stacks = np.random.default_rng(capacity), 0, [None, None]
    for moment in range(180):
        e = int(rng.integers(2))
        if stacks[e] is None:
            stacks[e], count = [np.zeros((8, 8), np.uint8)] * 3 + [frames_of(e, count)], count + 1
        stacks[e], count = [*stacks[e][-4:], frames_of(e, count)], count + 1
        end = rng.choice([0, 1, 2], p=[0.6, 0.25, 0.15])
        state, next_state = colours(np.stack(stacks[e][:4])), colours(np.stack(stacks[e][1:]))
        step = state, int(rng.integers(5)), float(rng.integers(-9, 9)), next_state, end == 1, end == 2, e
        memory.push(*step)
        naive.push(*step)
        stacks[e] = None if end else stacks[e]
        for n_step in (1, 2, 4):
            expected = {keys(*row) for row in naive.transitions(n_step, 0.5)}
            if expected:
                assert everything_sampled(memory, keys, n_step, 0.5, len(expected), rng) == expected, moment


def test_the_stack_of_a_young_state_is_black_before_its_episode():
    small = Small(40).play(6).play(6)
    states, _, rewards, *_ = small.sample(500)
    by_reward = {int(r): number(s) for r, s in zip(rewards, states, strict=True)}
    assert len(by_reward) == 12
    assert by_reward[6] == [None, None, None, 7] and by_reward[8] == [None, 7, 8, 9] and by_reward[9] == [7, 8, 9, 10]


@pytest.mark.parametrize("end, terminal", [("terminated", 1.0), ("truncated", 0.0)])
def test_termination_forbids_the_future_and_truncation_does_not(end, terminal):
    small = Small(40).play(5, end).play(5, end)
    _, _, rewards, next_states, terminals, discounts = small.sample(400, n_step=3, gamma=0.5)
    last = {float(r): (t, d, number(s)) for r, t, d, s in zip(rewards, terminals, discounts, next_states, strict=True)}
    assert last[4] == (terminal, 0.5, [2, 3, 4, 5])                     # one step before the end: γ¹, the last frame
    assert last[3 + 0.5 * 4] == (terminal, 0.25, [2, 3, 4, 5])     # two steps: γ²
    assert last[2 + 0.5 * 3 + 0.25 * 4] == (terminal, 0.125, [2, 3, 4, 5])
    assert last[1 + 0.5 * 2 + 0.25 * 3] == (0.0, 0.125, [1, 2, 3, 4])  # does not reach the end


def test_n_step_sums_never_cross_an_episodes_end():
    small = Small(60).play(3).play(4).play(2, "truncated").play(20, None)
    for n_step in (1, 2, 5, 12):
        ends, rng = (3, 7, 9), np.random.default_rng(n_step)
        expected = set()
        for first in range(29):
            limit = next((end for end in ends if first < end), 29)
            if limit == 29 and first + n_step > 29:  # not played to its n-th step yet
                continue
            stop = min(first + n_step, limit)
            expected.add((first % 5, sum(range(first, stop)), float(stop in (3, 7)), 0.5 ** 0 * 1.0, stop))
        rows = set()
        for _ in range(8):
            _, actions, rewards, next_states, terminals, discounts = small.memory.sample(200, rng, n_step, 1.0)
            for action, reward, next_state, terminal, discount in zip(actions, rewards, next_states, terminals,
                                                                      discounts, strict=True):
                after = number(next_state)[3]
                stop = after - sum(after > end for end in (3, 8, 11))  # frames -> steps: one extra frame an episode
                rows.add((int(action), float(reward), float(terminal), float(discount), stop))
        assert rows == expected


def test_the_same_generator_gives_the_same_batch():
    small = Small(50).play(12).play(30).play(9)
    first, again, other = (small.sample(32, n_step=3, gamma=0.9, seed=seed) for seed in (4, 4, 5))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_batch_is_not_a_view_into_the_memory():
    small = Small(50).play(30)
    before = small.sample(16)
    for array in small.sample(16):
        array[:] = 7
    assert all(np.array_equal(a, b) for a, b in zip(before, small.sample(16), strict=True))


def test_every_transition_is_drawn_equally_often():
    small = Small(240, n_envs=3)  # 80 places each: one wrapped, one half full, one with a few steps
    for length in (30, 17, 25, 40, 22):
        small.play(length, e=0)
    small.play(25, e=1).play(14, None, e=1)
    small.play(3, e=2).play(2, None, e=2)
    counts, rng = Counter(), np.random.default_rng(1)
    for _ in range(100):
        states, _, rewards, *_ = small.memory.sample(400, rng)
        counts.update(zip(states[:, 3, 4, 4].tolist(), rewards.tolist(), strict=True))
    places = len(counts)
    assert Counter(e for e, _ in counts)[201] == 39 and Counter(e for e, _ in counts)[202] == 5
    assert 70 <= Counter(e for e, _ in counts)[200] <= 80
    expected = 40_000 / places
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    assert abs(chi_square - (places - 1)) < 5 * math.sqrt(2 * (places - 1))


def test_a_prioritised_sample_draws_in_proportion():
    small, rng, counts = Small(80, n_envs=2).play(17).play(9).play(14, e=1), np.random.default_rng(2), Counter()
    memory = small.memory
    taken = memory.priority > 0
    assert taken.sum() == 40 and set(memory.priority[taken]) == {1.0}
    memory.priority[taken] = rng.uniform(0.1, 3, 40)
    for _ in range(40):
        memory.sample(500, rng)
        counts.update(zip(*(part.tolist() for part in memory.drawn), strict=True))
    assert len(counts) == 40
    expected = {place: 20_000 * memory.priority[place] / memory.priority.sum() for place in counts}
    assert sum((counts[place] - n) ** 2 / n for place, n in expected.items()) < 39 + 5 * math.sqrt(78)


def test_len_counts_what_is_stored_and_never_more_than_the_capacity():
    small = Small(30, n_envs=2)
    assert len(small.memory) == 0
    small.play(4, e=0)
    assert len(small.memory) == 5
    small.play(50, e=0)
    assert len(small.memory) == 15
    small.play(50, e=1)
    assert len(small.memory) == 30


def test_a_transition_takes_at_most_7300_bytes(steps):
    memory = ReplayMemory(4000, 4)
    naive = NaiveMemory(4000, 4)
    for step in steps.rows():
        memory.push(*step)
        naive.push(None, *step[1:3], None, *step[4:])
    held = sum(place.transition is not None for places in naive.places for place in places)
    taken = sum(value.nbytes for value in vars(memory).values() if isinstance(value, np.ndarray))
    assert 0.95 * 4000 < held < 4000 and taken / held <= 7300
    assert abs(memory.nbytes - taken) < 1000


def test_a_memory_saved_and_loaded_goes_on_the_same(tmp_path, steps):
    memory, other = ReplayMemory(300, 4), ReplayMemory(300, 4)
    for step in steps.rows(0, 500):
        memory.push(*step)
    if hasattr(memory, "priority"):
        memory.priority *= np.random.default_rng(0).uniform(0.1, 5, memory.priority.shape).astype(np.float32)
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    other.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    for more in (steps.rows(0, 0), steps.rows(500, 800)):
        for step in more:
            memory.push(*step)
            other.push(*step)
        assert len(memory) == len(other)
        for n_step in (1, 5):
            one, two = (each.sample(128, np.random.default_rng(n_step), n_step, 0.9) for each in (memory, other))
            assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_half_full_memory_saved_and_loaded_goes_on_the_same():
    small, other = Small(60, 2).play(9).play(4, None).play(7, None, e=1), Small(60, 2)
    other.memory.load_state_dict(deepcopy(small.memory.state_dict()))
    other.frame, other.step = list(small.frame), list(small.step)
    for story in (small, other):
        state = colours(np.stack([frames_of(0, k) for k in (11, 12, 13, 14)]))
        after = colours(np.stack([frames_of(0, k) for k in (12, 13, 14, 15)]))
        story.memory.push(state, 1, 13.0, after, True, False, 0)  # ends the episode that was on
        story.frame[0] = 16
        story.play(6)
    assert all(np.array_equal(a, b) for a, b in zip(small.sample(64, 3), other.sample(64, 3), strict=True))


# ===== 4. The agent

class Table(nn.Module):
    """A network whose Q-values are known: the newest frame of the state says which row (0 or 1)."""

    def __init__(self, *rows):
        super().__init__()
        self.q = nn.Parameter(torch.tensor(rows, dtype=torch.float32))

    def forward(self, x):
        return self.q[x[:, -1, 0, 0].round().long()]


def rows_as_states(*rows):
    return torch.tensor(rows, dtype=torch.float32)[:, None, None, None].expand(-1, 4, 84, 84).contiguous()


LOCAL, TARGET = ((1.0, 5.0, 2.0), (0.0, -1.0, 3.0)), ((10.0, 20.0, 30.0), (7.0, 8.0, -9.0))
NEXT_VALUE = {"single": (5.0, 3.0), "tutorial": (30.0, 8.0), "hasselt": (20.0, -9.0)}


@pytest.mark.parametrize("rule", RULES)
def test_td_target_by_hand(rule):
    """Going on with γ and with γ⁵, and a terminal step, whose target is the reward alone."""
    agent, (first, second) = DQNAgent((4, 84, 84), 3, rule=rule, memory=100), NEXT_VALUE[rule]
    agent.local_net = Table(*LOCAL)
    agent.target_net = agent.local_net if rule == "single" else Table(*TARGET)
    target = agent.td_target(torch.tensor([1.0, -2.0, 4.0, 0.5]), rows_as_states(0, 1, 0, 1),
                             torch.tensor([0.0, 0.0, 1.0, 0.0]), torch.tensor([0.9, 0.9, 0.9, 0.9 ** 5]))
    expected = [1 + 0.9 * first, -2 + 0.9 * second, 4.0, 0.5 + 0.9 ** 5 * second]
    np.testing.assert_allclose(target.detach().numpy(), expected, rtol=1e-6)


def ready_agent(rule="tutorial", **settings):
    """An agent with 40 transitions of noise in its memory, in episodes of 10, ready to learn."""
    agent = DQNAgent((4, 84, 84), 3, rule=rule, **{"memory": 100, "batch": 8, "learn_start": 8, **settings})
    rng = np.random.default_rng(1)
    for _ in range(4):
        frames = [np.zeros((84, 84), np.float32)] * 3 + list(colours(rng.integers(0, 256, (11, 84, 84), np.uint8)))
        for t in range(10):
            state, next_state = np.stack(frames[t:t + 4]), np.stack(frames[t + 1:t + 5])
            agent.remember(state, int(rng.integers(3)), float(rng.normal(0, 2)), next_state, t == 9)
    return agent


def spy_on_recall(agent):
    """The list that every batch the agent recalls is going to be put into."""
    seen, recall = [], agent.recall
    agent.recall = lambda: seen.append(recall()) or seen[-1]
    return seen


def spy_on_gradients(agent):
    """The list that the gradients of every step of the optimiser are going to be put into."""
    seen = []
    agent.optimiser.register_step_pre_hook(lambda optimiser, *_: seen.append(
        [weight.grad.clone() for group in optimiser.param_groups for weight in group["params"]]))
    return seen


def part_networks(agent):
    """Makes the target network different from the local one, with no copy due in the next update."""
    agent.updates = 1
    if agent.rule != "single":
        with torch.no_grad():
            for weight in agent.target_net.parameters():
                weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))


def huber(error):
    """0.5 x² within ±1, |x| − 0.5 beyond."""
    size = error.abs()
    return torch.where(size < 1, 0.5 * error ** 2, size - 0.5)


def errors(rule, local, target, batch, residual=False):
    """Q(s, a) − target for every transition of the batch; `residual`: with the gradient through the target, too."""
    state, action, reward, next_state, terminal, discount = batch
    values = (local if rule == "single" else target)(next_state)
    best = local(next_state).argmax(1) if rule == "hasselt" else values.argmax(1)
    rows = range(len(action))
    goal = reward + discount * values[rows, best] * (1 - terminal)
    return local(state)[rows, action] - (goal if residual else goal.detach())


@pytest.mark.parametrize("rule", RULES)
def test_no_gradient_flows_through_the_target(rule):
    agent = ready_agent(rule, copy=1000, n_step=3, batch=16, gamma=0.9)
    part_networks(agent)
    local, target = deepcopy(agent.local_net), deepcopy(agent.target_net)
    batches, gradients = spy_on_recall(agent), spy_on_gradients(agent)
    got, _ = agent.experience_replay()
    loss, through = (huber(errors(rule, local, target, batches[0], residual)).mean() for residual in (False, True))
    expected, residual = (torch.autograd.grad(x, list(local.parameters())) for x in (loss, through))
    assert got.item() == pytest.approx(loss.item(), rel=1e-5) and len(gradients[0]) == 10
    for gradient, by_hand in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(gradient, by_hand, rtol=1e-3, atol=1e-6)
    if rule == "single":
        assert max(float((a - b).abs().max()) for a, b in zip(residual, expected, strict=True)) > 1e-3
    else:
        assert all(weight.grad is None for weight in agent.target_net.parameters())


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_learns_what_float32_learns(rule):
    """The target's pass must not leave weights behind that the learning pass takes for constants."""
    gradients = []
    for bf16 in (False, True):
        agent = ready_agent(rule, copy=1000, bf16=bf16, batch=16)
        part_networks(agent)
        gradients.append(spy_on_gradients(agent))
        assert agent.experience_replay() is not None
    for exact, rough in zip(gradients[0][0], gradients[1][0], strict=True):
        assert rough.dtype == torch.float32
        assert float((exact - rough).norm()) < 0.2 * float(exact.norm())


def table_agent(**settings):
    """Its states are all black or all white, its networks are tables; 40 transitions with rewards 0 to 4.5."""
    agent = DQNAgent((4, 84, 84), 3, **{"memory": 100, "batch": 32, "learn_start": 32, "copy": 1000, **settings})
    agent.updates, agent.local_net, agent.target_net = 1, Table(*LOCAL), Table(*TARGET)
    white, black = np.ones((4, 84, 84), np.float32), np.zeros((4, 84, 84), np.float32)
    for k in range(40):  # each an episode of one step, that goes on in the other colour where it is not terminal
        state = np.concatenate([black[:3], (white if k % 2 else black)[:1]])
        next_state = np.concatenate([state[1:], (white if k % 3 else black)[:1]])
        agent.remember(state, k % 3, k % 10 / 2, next_state, k % 4 == 0, k % 4 != 0)
    return agent


def table_errors(batch):
    """Q(s, a) − target with the tutorial's rule, number by number."""
    found = []
    for state, action, reward, next_state, terminal, discount in zip(*(x.numpy() for x in batch), strict=True):
        future = 0 if terminal else discount * max(TARGET[int(next_state[-1, 0, 0])])
        found.append(LOCAL[int(state[-1, 0, 0])][action] - (reward + future))
    return np.array(found)


def test_the_loss_is_the_mean_of_hubers():
    agent = table_agent(gamma=0.05)
    batches = spy_on_recall(agent)
    loss, mean_q = agent.experience_replay()
    error = np.abs(table_errors(batches[0]))
    assert error.min() < 1 < error.max()
    assert loss.item() == pytest.approx(np.where(error < 1, 0.5 * error ** 2, error - 0.5).mean(), rel=1e-5)
    state, action = batches[0][0][:, -1, 0, 0].long(), batches[0][1]
    assert mean_q.item() == pytest.approx(np.mean([LOCAL[s][a] for s, a in zip(state, action, strict=True)]), rel=1e-5)


def test_prioritised_replay_weighs_and_updates_what_it_drew():
    """Weights (chance over uniform chance)^-0.4 over their maximum; afterwards p = (|δ| + 0.01)^priority."""
    agent = table_agent(gamma=0.05, priority=0.5)
    memory, batches, before = agent.memory, spy_on_recall(agent), []
    taken = memory.priority > 0
    memory.priority[taken] = np.random.default_rng(3).uniform(0.2, 4, 40)
    before = memory.priority.copy()
    loss, _ = agent.experience_replay()
    error, p = np.abs(table_errors(batches[0])), before[memory.drawn]
    weight = (p / before[taken].mean()) ** -0.4
    expected = (weight / weight.max() * np.where(error < 1, 0.5 * error ** 2, error - 0.5)).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(memory.priority[memory.drawn], (error + 0.01) ** 0.5, rtol=1e-4)
    drawn = np.zeros_like(taken)
    drawn[memory.drawn] = True
    assert np.array_equal(memory.priority[~drawn], before[~drawn]) and not drawn[~taken].any()
    highest = max(1, memory.priority.max())
    agent.remember(*[np.zeros((4, 84, 84), np.float32), 0, 0.0, np.zeros((4, 84, 84), np.float32)], True)
    assert np.count_nonzero(memory.priority) == 41 and (memory.priority == highest).sum() >= 1


def test_without_priority_every_transition_stays_alike():
    agent = table_agent(priority=0.0)
    for _ in range(3):
        agent.experience_replay()
    assert set(agent.memory.priority.flat) == {0.0, 1.0} and np.count_nonzero(agent.memory.priority) == 40


def test_adam_takes_the_step_with_the_given_learning_rate():
    agent = ready_agent("tutorial", lr=3e-3)
    before = deepcopy(agent.local_net.state_dict())
    agent.experience_replay()
    moved = max(float((weight - before[name]).abs().max()) for name, weight in agent.local_net.state_dict().items())
    assert moved == pytest.approx(3e-3, rel=0.01)  # Adam's first step is lr × sign(gradient)


def test_single_has_no_separate_target_network():
    agent = ready_agent("single", copy=2)
    for _ in range(3):
        assert agent.target_net is agent.local_net
        agent.experience_replay()
    names = {id(p) for group in agent.optimiser.param_groups for p in group["params"]}
    assert names == {id(p) for p in agent.local_net.parameters()}


@pytest.mark.parametrize("rule", ["tutorial", "hasselt"])
def test_the_target_is_copied_every_copy_updates_and_at_no_other_time(rule):
    agent = ready_agent(rule, copy=3, lr=1e-3)

    def weights(net):
        return torch.cat([weight.detach().flatten() for weight in net.parameters()])

    before = []
    for k in range(8):
        before.append(weights(agent.local_net))
        assert agent.updates == k and agent.experience_replay() is not None
        assert torch.equal(weights(agent.target_net), before[k - k % 3])
        assert not torch.equal(weights(agent.local_net), before[k])


def test_the_target_network_used_in_an_update_is_the_one_just_copied():
    agent, used = ready_agent("tutorial", copy=3, lr=1e-3), []
    td_target = agent.td_target

    def spy(*batch):
        used.append(all(torch.equal(a, b) for a, b in zip(agent.local_net.parameters(), agent.target_net.parameters(),
                                                           strict=True)))
        return td_target(*batch)

    agent.td_target = spy
    for _ in range(7):
        agent.experience_replay()
    assert used == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("rule", RULES)
def test_copy_model_makes_the_two_networks_equal(rule):
    agent = ready_agent(rule, copy=100)
    agent.experience_replay()
    agent.copy_model()
    for a, b in zip(agent.local_net.parameters(), agent.target_net.parameters(), strict=True):
        assert torch.equal(a, b)
    assert rule == "single" or agent.local_net is not agent.target_net


def test_there_is_no_update_before_there_is_enough_to_learn_from():
    agent, state = DQNAgent((4, 84, 84), 3, memory=100, batch=4, learn_start=20), np.zeros((4, 84, 84), np.float32)
    first = None
    for k in range(1, 41):
        agent.remember(state, 0, 0.0, state, False)
        if agent.experience_replay() is not None:
            first = first or k
    assert 19 <= first <= 22 and agent.updates == 41 - first


def test_epsilon_follows_the_tutorials_schedule():
    settings = parse_args(["--preset", "tutorial"]).settings
    agent = DQNAgent((4, 84, 84), 5, memory=100, eps_start=settings.eps_start, eps_decay=settings.eps_decay,
                     eps_min=settings.eps_min)
    schedule = []
    for agent.updates in range(1000):
        schedule.append(agent.epsilon)
    np.testing.assert_allclose(schedule[:390], 0.99 ** np.arange(390))
    assert schedule[0] == 1.0 and 0.02 < schedule[389] < 0.02006 and set(schedule[390:]) == {0.02}
    agent.updates = 10 ** 7
    assert agent.epsilon == 0.02


def test_epsilon_falls_once_per_update_and_by_nothing_else():
    agent = ready_agent(eps_start=0.8, eps_decay=0.5, eps_min=0.15)
    assert agent.epsilon == 0.8
    agent.act(np.zeros((1, 4, 84, 84), np.float32))
    assert agent.epsilon == 0.8
    for expected in (0.4, 0.2, 0.15, 0.15):
        agent.experience_replay()
        assert agent.epsilon == pytest.approx(expected)


def greedy_agent(epsilon, n_envs, **settings):
    """Its network prefers action 3 of 5, in state 1 action 0."""
    agent = DQNAgent((4, 84, 84), 5, memory=100 * n_envs, n_envs=n_envs, eps_start=epsilon, eps_min=0.0,
                     eps_decay=1.0, **settings)
    agent.local_net = Table((0, 1, 2, 9, 3), (5, 1, 2, 3, 4))
    agent.target_net = Table((9, 0, 0, 0, 0), (0, 9, 0, 0, 0))
    return agent


def test_act_is_greedy_on_the_local_network_without_epsilon():
    agent, states = greedy_agent(0.0, 4, hold=16), rows_as_states(0, 1, 1, 0).numpy()
    for _ in range(20):
        actions = agent.act(states)
        assert actions.shape == (4,) and actions.dtype == np.int64 and actions.tolist() == [3, 0, 0, 3]


@pytest.mark.parametrize("epsilon", [1.0, 0.4])
def test_act_explores_with_probability_epsilon_and_uniformly(epsilon):
    agent, states = greedy_agent(epsilon, 8), np.zeros((8, 4, 84, 84), np.float32)
    counts = np.bincount(np.concatenate([agent.act(states) for _ in range(600)]), minlength=5)
    expected = 4800 * (epsilon / 5 + (1 - epsilon) * (np.arange(5) == 3))
    assert ((counts - expected) ** 2 / expected).sum() < 25  # chi square with 4 degrees: p < 0.0001


def test_the_games_explore_independently():
    agent, states = greedy_agent(1.0, 2), np.zeros((2, 4, 84, 84), np.float32)
    pairs = Counter(tuple(agent.act(states)) for _ in range(1000))
    assert len(pairs) == 25 and sum(pairs[k, k] for k in range(5)) < 300


def set_epsilon(agent, epsilon):
    agent.eps_start = epsilon
    assert agent.epsilon == epsilon


def test_a_random_action_is_held_as_long_as_drawn():
    """Draw at ε = 1, look how long it is to be held, and go on at ε = 0: then only the hold can be random."""
    agent, states, lengths = greedy_agent(1.0, 3, hold=6), np.zeros((3, 4, 84, 84), np.float32), []
    for _ in range(400):
        set_epsilon(agent, 1.0)
        drawn, left = agent.act(states), agent.held[1].copy()
        set_epsilon(agent, 0.0)
        for _ in range(6):
            actions = agent.act(states)
            assert actions.tolist() == np.where(left > 0, drawn, 3).tolist()
            left = np.maximum(left - 1, 0)
            lengths_left = left
        assert not lengths_left.any() and not agent.held[1].any()
        set_epsilon(agent, 1.0)
        agent.act(states)
        lengths += (agent.held[1] + 1).tolist()
        agent.held[1] = 0
    share = np.bincount(lengths, minlength=7)[1:] / len(lengths)
    zeta = 1 / np.arange(1, 2000) ** 2 / (math.pi ** 2 / 6)
    np.testing.assert_allclose(share, [*zeta[:5], 1 - zeta[:5].sum()], atol=0.05)  # P(k) ~ 1/k², at most 6


def test_no_new_action_is_drawn_while_one_is_held():
    agent, states = greedy_agent(1.0, 1, hold=16), np.zeros((1, 4, 84, 84), np.float32)
    for _ in range(300):
        drawn = agent.act(states)
        for _ in range(int(agent.held[1, 0])):
            assert agent.act(states) == drawn


@pytest.mark.parametrize("end", ["terminal", "truncated"])
def test_a_held_action_is_dropped_at_the_end_of_its_episode_only(end):
    agent, state = greedy_agent(0.0, 3, hold=16), np.zeros((4, 84, 84), np.float32)
    agent.held[:] = [[4, 4, 4], [9, 9, 9]]
    agent.remember(state, 0, 0.0, state, False, env=0)
    agent.remember(state, 0, 0.0, state, end == "terminal", end == "truncated", env=1)
    for _ in range(3):
        assert agent.act(np.stack([state] * 3)).tolist() == [4, 3, 4]


def test_hold_0_is_plain_epsilon_greedy():
    agent, states = greedy_agent(1.0, 1, hold=0), np.zeros((1, 4, 84, 84), np.float32)
    actions = []
    for _ in range(1500):
        actions += agent.act(states).tolist()
        assert not agent.held[1].any()
    repeats = np.mean(np.diff(actions) == 0)
    assert abs(repeats - 0.2) < 0.05


def test_the_network_is_the_tutorials():
    net = DQNSolver((4, 84, 84), 5)
    kinds = [type(layer).__name__ for layer in net.modules() if not list(layer.children())]
    assert [kind for kind in kinds if kind != "Flatten"] == ["Conv2d", "ReLU"] * 3 + ["Linear", "ReLU", "Linear"]
    convs = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding) for c in convs] == [
        (4, 32, (8, 8), (4, 4), (0, 0)), (32, 64, (4, 4), (2, 2), (0, 0)), (64, 64, (3, 3), (1, 1), (0, 0))]
    linear = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(3136, 512), (512, 5)]
    assert net(torch.rand(3, 4, 84, 84)).shape == (3, 5)


def test_the_seed_decides_the_first_weights_and_touches_no_other_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (DQNAgent((4, 84, 84), 3, memory=100, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    pairs = [(one, same, True), (one, other, False)]
    for a, b, equal in pairs:
        assert torch.equal(a.local_net.fc[0].weight, b.local_net.fc[0].weight) == equal
    assert all(torch.equal(a, b) for a, b in zip(one.local_net.parameters(), one.target_net.parameters(), strict=True))


# ===== 5. Tasks whose Q-values are known

class Probe:
    """One or two steps of constant-colour states. colour_of(t, rng), reward_of(t, colour, action)."""

    def __init__(self, n_actions, colour_of, reward_of, length=1):
        self.n_actions, self.colour_of, self.reward_of, self.length = n_actions, colour_of, reward_of, length

    def reset(self, rng):
        self.t, self.colour = 0, self.colour_of(0, rng)
        self.stack = [np.zeros((84, 84), np.uint8)] * 3
        return self.look()

    def look(self):
        self.stack = [*self.stack[-3:], np.full((84, 84), self.colour, np.uint8)]
        return colours(np.stack(self.stack))

    def step(self, action, rng):
        reward, self.t = self.reward_of(self.t, self.colour, action), self.t + 1
        self.colour = self.colour_of(self.t, rng)
        return self.look(), reward, self.t == self.length


def state_of(*shades):
    """The state after these colours since the start."""
    return colours(np.stack([np.full((84, 84), c, np.uint8) for c in ([0] * 4 + list(shades))[-4:]]))


BRIGHT, DARK = 220, 40


def either(t, rng):
    return int(rng.choice([DARK, BRIGHT]))


PROBES = {  # task, [(state, its Q-values)], updates
    "one action, one step, reward 1": (
        Probe(1, lambda t, rng: DARK, lambda t, c, a: 1.0), [(state_of(DARK), [1.0])], 60),
    "the reward depends on the state": (
        Probe(1, either, lambda t, c, a: 1.0 if c == BRIGHT else -1.0),
        [(state_of(BRIGHT), [1.0]), (state_of(DARK), [-1.0])], 100),
    "the reward comes one step later": (
        Probe(1, lambda t, rng: (DARK, BRIGHT, DARK)[t], lambda t, c, a: float(t == 1), length=2),
        [(state_of(DARK), [0.5]), (state_of(DARK, BRIGHT), [1.0])], 120),
    "the reward depends on the action": (
        Probe(2, lambda t, rng: DARK, lambda t, c, a: (-1.0, 1.0)[a]), [(state_of(DARK), [-1.0, 1.0])], 80),
    "the reward depends on state and action": (
        Probe(2, either, lambda t, c, a: 1.0 if (c == BRIGHT) == a else -1.0),
        [(state_of(BRIGHT), [-1.0, 1.0]), (state_of(DARK), [1.0, -1.0])], 140),
}


@pytest.mark.parametrize("name, rule", [*((name, rule) for name in PROBES for rule in ("tutorial", "hasselt")),
                                        ("the reward comes one step later", "single")])
def test_the_agent_learns_the_known_q_values(name, rule):
    task, known, updates = PROBES[name]
    agent = DQNAgent((4, 84, 84), task.n_actions, rule=rule, gamma=0.5, lr=1e-3, batch=16, memory=400, copy=5,
                     eps_start=1.0, eps_decay=1.0, eps_min=1.0, learn_start=32, n_step=1, reward_scale=1.0, seed=1)
    rng, state = np.random.default_rng(0), None
    while agent.updates < updates:
        state = task.reset(rng) if state is None else state
        action = int(agent.act(state[None])[0])
        next_state, reward, over = task.step(action, rng)
        agent.remember(state, action, reward, next_state, over)
        state = None if over else next_state
        agent.experience_replay()
    learnt = agent.q_values(np.stack([state for state, _ in known]))
    assert learnt.dtype == np.float32
    np.testing.assert_allclose(learnt, [q for _, q in known], atol=0.05)


@pytest.mark.parametrize("switch, late, rates", [((0,), (1e-4,), [1e-3] * 4), ((2,), (1e-4,), [1e-3, 1e-3, 1e-4, 1e-4]),
                                                 ((1, 3), (1e-4, 2e-5), [1e-3, 1e-4, 1e-4, 2e-5])])
def test_the_learning_rate_changes_after_so_many_updates(switch, late, rates):
    agent = DQNAgent((4, 84, 84), 5, memory=1000, lr=1e-3, lr_late=late, lr_switch=switch)
    rng, seen = np.random.default_rng(0), []
    for _ in range(40):
        agent.remember(rng.random((4, 84, 84), np.float32), 1, 1.0, rng.random((4, 84, 84), np.float32), False)
    agent.optimiser.register_step_post_hook(lambda optimiser, *_: seen.append(optimiser.param_groups[0]["lr"]))
    for _ in range(4):
        agent.experience_replay()
    assert seen == rates


def test_the_long_average_gives_the_nth_network_the_weight_n_to_the_power():
    """Exactly so for power 1; for a larger one about so, as in the paper."""
    net, values = DQNSolver((4, 84, 84), 5), np.random.default_rng(0).random(60)
    for power, tolerance in ((1, 1e-6), (8, 0.02)):
        average = DQNAgent((4, 84, 84), 5, memory=1000, average=power).average_net
        for value in values:
            torch.nn.init.constant_(net.fc[2].bias, value)
            average.update_parameters(net)
        weights = np.arange(1, 61) ** float(power)
        wanted = (weights * values).sum() / weights.sum()
        assert average.module.fc[2].bias[0].item() == pytest.approx(wanted, abs=tolerance)


def test_the_average_network_is_the_running_mean_of_every_tenth_network_and_is_what_exams_see(monkeypatch):
    agent, rng = DQNAgent((4, 84, 84), 5, memory=1000, lr=1e-2), np.random.default_rng(0)
    for _ in range(40):
        agent.remember(rng.random((4, 84, 84), np.float32), 1, 1.0, rng.random((4, 84, 84), np.float32), False)
    mean = None
    for update in range(25):
        agent.experience_replay()
        weight = agent.local_net.fc[2].bias.detach().clone()
        if update % 10 == 0:
            mean = weight if mean is None else 0.99 * mean + 0.01 * weight
    torch.testing.assert_close(agent.average_net.module.fc[2].bias.detach(), mean)
    assert not torch.allclose(mean, weight)
    asked, states = [], rng.random((3, 4, 84, 84), np.float32)
    ended = {"end": "died", "furthest_x": 0, "q": 2.0, "discounted_return": 1.0}
    monkeypatch.setattr(m, "play", lambda q_values, *_, **__: asked.append(q_values(states)) or [ended])
    settings = SimpleNamespace(eval_episodes=2, seed=0, stage="1-1", show_jump="no", gamma=0.9, reward_scale=0.1)
    rows = [{"cleared": 1}] * 30 + [{"cleared": 0}] * 80 + [{"cleared": 1}] * 10
    exam = m.examine(agent, settings, {"steps": 0, "seconds": 0}, rows)
    assert (exam["q"], exam["discounted_return"], exam["training_clears"]) == (2, 1, 0.2)
    assert exam["score"] == pytest.approx(0.2)
    ended.update(end="cleared", furthest_x=3161)
    assert m.examine(agent, settings, {"steps": 0, "seconds": 0}, [])["score"] == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        np.testing.assert_allclose(asked[0], agent.average_net.module(torch.from_numpy(states)), rtol=1e-5)


# ===== 6. A run

TINY = ["--envs", "2", "--steps", "300", "--learn-start", "40", "--batch", "8", "--copy", "7", "--eps-decay", "0.97",
        "--train-noise", "epsilon", "--eval-every", "0", "--precision", "float32", "--device", "cpu", "--threads", "1",
        "--n-step", "3", "--memory", "1000"]


def train(folder, *flags, **settings):
    """A run through the program's own parser; `settings` for what the command line would refuse."""
    args = parse_args([*TINY, *flags])
    vars(args.settings).update(settings)
    folder.mkdir(parents=True, exist_ok=True)
    return m.run(args.settings, folder)


# 100 places a game: the ring goes round. ε stays 1: then no rounding of the processor's decides what is played, and
# the episodes end where they ended when this was written.
REAL = {"double": "hasselt", "memory": 200, "eps_decay": 1.0}


def real_run(folder):
    train(folder, **REAL)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A run of 300 steps in two real games. Not to be written to: use a copy."""
    return once(tmp_path_factory, "run", real_run)


def csv_of(folder):
    """The rows without the time they took."""
    with open(folder / "episodes.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def checkpoint(folder, name="last.pt"):
    return torch.load(folder / name, weights_only=True)


def same_weights(one, other, networks=("local_net", "target_net")):
    return all(torch.equal(one[net][name], other[net][name]) for net in networks for name in one[net])


def assert_same_run(one, other):
    assert csv_of(one) == csv_of(other) and len(csv_of(one)) >= 2
    first, second = checkpoint(one), checkpoint(other)
    assert same_weights(first, second)
    moments = [[entry[key] for entry in saved["optimiser"]["state"].values() for key in sorted(entry)]
               for saved in (first, second)]
    assert len(moments[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_the_same_seed_gives_the_same_run(tiny, tmp_path):
    real_run(tmp_path / "again")
    assert_same_run(tiny, tmp_path / "again")


def test_another_seed_gives_another_run(tiny, tmp_path):
    train(tmp_path / "other", "--seed", "1", **REAL)
    assert csv_of(tiny) != csv_of(tmp_path / "other")
    assert not same_weights(checkpoint(tiny), checkpoint(tmp_path / "other"))


@pytest.mark.parametrize("rule", RULES)
def test_the_seed_decides_a_toy_run_for_every_rule(toy, rule, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        train(tmp_path / name, "--steps", "120", "--seed", str(seed), double=rule)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert csv_of(tmp_path / "one") != csv_of(tmp_path / "three")


def test_a_resumed_run_equals_one_that_was_never_interrupted(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    train(folder, "--steps", "170", **REAL)
    steps_then = sum(int(row["length"]) for row in csv_of(folder))
    assert steps_then < 166 and int(csv_of(folder)[-1]["env_steps"]) < 168, "it should stop in mid-episode"
    assert main(["--resume", str(folder), "--steps", "300"]) == 0
    assert_same_run(tiny, folder)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("noise", ["noop", "epsilon", "sticky"])
def test_a_toy_run_resumed_twice_equals_one_that_was_never_interrupted(toy, rule, noise, tmp_path, capsys):
    flags = ["--train-noise", noise, "--envs", "3", "--learn-start", "20", "--memory", "1000"]
    settings = {"memory": 60, "eps_decay": 0.99, "hold": 5, "double": rule}
    train(tmp_path / "whole", *flags, "--steps", "150", **settings)
    train(tmp_path / "parts", *flags, "--steps", "51", **settings)
    for stop in ("99", "150"):
        assert main(["--resume", str(tmp_path / "parts"), "--steps", stop]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_run_drops_the_episodes_played_after_its_checkpoint(toy, tmp_path, capsys):
    """A crash: the table is ahead of the checkpoint, and its last line is half written."""
    train(tmp_path / "whole", "--steps", "150")
    train(tmp_path / "crash", "--steps", "60")
    table = tmp_path / "crash" / "episodes.csv"
    table.write_text(table.read_text() + table.read_text().splitlines()[-1] + "\n12,9")
    assert main(["--resume", str(tmp_path / "crash"), "--steps", "150"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "crash")


def test_a_run_leaves_readable_files(tiny):
    settings = json.loads((tiny / "settings.json").read_text())
    assert (settings["double"], settings["steps"], settings["envs"], settings["seed"]) == ("hasselt", 300, 2, 0)
    with open(tiny / "episodes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["episode", "env_steps", "seconds", "return", "length", "furthest_x", "cleared", "epsilon",
                             "mean_q", "loss"]
    assert [int(row["episode"]) for row in rows] == list(range(1, len(rows) + 1))
    assert all(int(row["furthest_x"]) > 40 and int(row["cleared"]) in (0, 1) for row in rows)
    assert 0 < sum(int(row["length"]) for row in rows) <= 300
    best, last = checkpoint(tiny, "best.pt"), checkpoint(tiny)
    for name, weight in best["local_net"].items():
        torch.testing.assert_close(weight.float(), last["average_net"][f"module.{name}"], rtol=1e-3, atol=1e-6)
    with Image.open(tiny / "rewards.png") as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 300
    assert {path.suffix for path in tiny.iterdir()} == {".pt", ".json", ".csv", ".png", ""}  # "": the lock
    assert not [path.name for path in tiny.iterdir() if "partial" in path.name]


def test_the_table_says_what_happened(toy, tmp_path):
    """Without learning and noise at ε = 0, every episode of the toy is the same; and it can be worked out."""
    rows = train(tmp_path / "run", "--double", "--train-noise", "none", "--eps-start", "0", "--eps-min", "0",
                 "--learn-start", "900", "--steps", "0", "--episodes", "6")
    env, net = m.make_env(), DQNSolver((4, 84, 84), 5)
    net.load_state_dict({k: v.float() for k, v in checkpoint(tmp_path / "run")["local_net"].items()})
    state, total, length, over = env.reset()[0], 0.0, 0, False
    while not over:
        with torch.no_grad():
            action = int(net(torch.from_numpy(state[None])).argmax())
        state, reward, over, _, info = env.step(action)
        total, length = total + reward, length + 1
    for k, row in enumerate(csv_of(tmp_path / "run")):
        assert (float(row["return"]), int(row["length"]), int(row["furthest_x"]), int(row["cleared"])) == (
            total, length, info["x_pos"], int(info["flag_get"]))
        assert int(row["episode"]) == k + 1 and math.isnan(float(row["loss"])) and float(row["epsilon"]) == 0
    assert len(rows) == len(csv_of(tmp_path / "run")) >= 6


def test_the_agent_learns_once_every_train_every_steps(toy, tmp_path):
    for every, envs in ((4, 2), (1, 2), (3, 4)):
        folder = tmp_path / f"{every}-{envs}"
        train(folder, "--train-every", str(every), "--envs", str(envs), "--steps", "120", "--learn-start", "8",
              "--n-step", "1")
        assert 0 <= 120 / every - checkpoint(folder)["updates"] <= 16 / every + 2


@pytest.mark.parametrize("noises, slips, waits", [("epsilon", 20, 0), ("sticky", 20, 0), ("noop", 0, 20),
                                                  ("noop,epsilon", 20, 20), ("none", 0, 0)])
def test_the_agent_remembers_that_it_waited_but_not_that_it_slipped(noises, slips, waits, toy, tmp_path, monkeypatch):
    """Chosen, remembered and played, step by step. In the toy's short games there is idling most of the time."""
    chosen, remembered, played, idle = [], [], [], []
    monkeypatch.setitem(m.NOISES, "epsilon", {"epsilon": 0.5})
    act, disturb, remember = DQNAgent.act, m.Episode.disturb, DQNAgent.remember
    monkeypatch.setattr(DQNAgent, "act", lambda self, states: chosen.extend(got := act(self, states)) or got)
    monkeypatch.setattr(m.Episode, "disturb", lambda self, action: idle.append(self.idle > 0) or played.append(
        got := disturb(self, action)) or got)
    monkeypatch.setattr(DQNAgent, "remember", lambda self, state, action, *rest, **more:
                        remembered.append(int(action)) or remember(self, state, action, *rest, **more))
    train(tmp_path / "run", "--envs", "1", "--train-noise", noises, "--steps", "300", "--learn-start", "900")
    steps = list(zip(chosen, remembered, played, idle, strict=True))
    assert len(steps) == 300 and all(known == (0 if waiting else own) for own, known, _, waiting in steps)
    assert all(game == 0 for *_, game, waiting in steps if waiting)
    slipped, waited = (sum(hidden) for hidden in ((known != game for _, known, game, _ in steps), idle))
    assert slipped >= slips if slips else slipped == 0
    assert waited >= waits if waits else waited == 0


def test_the_bonus_for_the_flag_is_learnt_from_but_is_no_part_of_the_return(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "clear_at", 60)
    kept = {}
    for bonus in ("0", "50"):
        folder = tmp_path / bonus
        train(folder, "--envs", "1", "--flag-bonus", bonus, "--reward-scale", "0.1", "--steps", "200",
              "--learn-start", "900", "--train-noise", "none")
        kept[bonus] = checkpoint(folder)["memory"]["rewards"], checkpoint(folder)["memory"]["end"]
    assert csv_of(tmp_path / "0") == csv_of(tmp_path / "50")
    (without, end), (with_bonus, same_end) = kept["0"], kept["50"]
    cleared = sum(int(row["cleared"]) for row in csv_of(tmp_path / "50"))
    assert torch.equal(end, same_end) and 3 < cleared < len(csv_of(tmp_path / "50"))
    more = with_bonus - without
    assert sorted(set(more.flatten().round(decimals=4).tolist())) == [0, 5] and int((more > 1).sum()) == cleared
    assert (end[more > 1] == 1).all()


def test_exams_keep_the_best_network_and_do_not_disturb_the_training(toy, tmp_path, monkeypatch):
    train(tmp_path / "without", "--steps", "130")
    scores, weights = iter([3.0, 9.0, 5.0]), []

    def exam(q_values, episodes, *rest, play=m.play, **more):
        results = play(q_values, episodes, *rest, **more)
        if len(weights) % 2 == 0:
            exam.score = next(scores)
        weights.append({k: v.half() for k, v in q_values.keywords["net"].module.state_dict().items()})
        return [{**result, "end": "died", "furthest_x": exam.score} for result in results]

    monkeypatch.setattr(m, "play", exam)
    train(tmp_path / "with", "--steps", "130", "--eval-every", "40", "--eval-episodes", "3")
    assert_same_run(tmp_path / "without", tmp_path / "with")
    exams = json.loads((tmp_path / "with" / "exams.json").read_text())
    assert [e["steps"] for e in exams] == [40, 80, 120] and [e["mean_furthest_x"] for e in exams] == [3, 9, 5]
    best = checkpoint(tmp_path / "with", "best.pt")["local_net"]
    assert all(torch.equal(best[name], weights[2][name]) for name in best)  # of the second exam


def test_until_clear_stops_at_an_exam_that_clears(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "clear_at", 0)
    train(tmp_path / "run", "--eval-every", "30", "--eval-episodes", "2", "--until-clear", "0.9", "--steps", "200")
    exams = json.loads((tmp_path / "run" / "exams.json").read_text())
    assert [(e["steps"], e["cleared"], e["episodes"]) for e in exams] == [(30, 2, 2)]
    assert checkpoint(tmp_path / "run")["count"]["steps"] == 30


def test_a_run_stops_at_its_limits(toy, tmp_path):
    assert len(train(tmp_path / "episodes", "--steps", "0", "--episodes", "4", "--envs", "1")) == 4
    train(tmp_path / "steps", "--steps", "31", "--envs", "2")
    assert checkpoint(tmp_path / "steps")["count"]["steps"] in (31, 32)
    train(tmp_path / "minutes", "--steps", "0", "--minutes", "0.002")
    assert 0.12 <= checkpoint(tmp_path / "minutes")["count"]["seconds"] < 60


def test_the_tutorial_preset_is_the_tutorials_settings_to_the_letter():
    settings = vars(parse_args(["--preset", "tutorial", "--double"]).settings)
    tutorial = {
        "double": "tutorial", "gamma": 0.90, "lr": 2.5e-4, "batch": 32, "memory": 30_000, "train_every": 1,
        "copy": 5_000, "eps_start": 1.0, "eps_decay": 0.99, "eps_min": 0.02, "episodes": 10_000, "n_step": 1,
        "hold": 0, "reward_scale": 1.0, "train_noise": "none", "flag_bonus": 0, "envs": 1, "stage": "1-1",
        "precision": "float32",
        "steps": 0, "minutes": 0, "until_clear": 0, "eval_every": 0}
    assert {name: settings[name] for name in tutorial} == tutorial
    assert settings["learn_start"] <= 32 and settings.get("priority", 0) == 0  # a uniform batch as soon as there is one


@pytest.mark.parametrize("preset", m.PRESETS)
def test_every_preset_holds_settings_only_and_trains(preset, toy, tmp_path, capsys):
    flags = ["--steps", "60", "--envs", "2", "--memory", "1000", "--learn-start", "40", "--eval-episodes", "2"]
    assert main(["--runs", str(tmp_path), "--name", "a", "--double", "--preset", preset, *flags, "--threads", "1"]) == 0
    kept = json.loads((tmp_path / "a" / "settings.json").read_text())
    typed = {flag.strip("-").replace("-", "_") for flag in flags}
    assert all(kept[name] == value for name, value in m.PRESETS[preset].items() if name not in typed)
    assert set(m.PRESETS[preset]) <= set(m.DEFAULTS) == set(kept) and kept["steps"] == 60
    assert checkpoint(tmp_path / "a")["updates"] > 0


def test_explicit_flags_win_over_the_preset():
    chosen = parse_args(["--preset", "tutorial", "--gamma", "0.5", "--envs", "3", "--hold", "16"]).settings
    assert (chosen.gamma, chosen.envs, chosen.hold, chosen.copy) == (0.5, 3, 16, 5_000)
    chosen = parse_args(["--gamma", "0.95", "--preset", "tutorial"]).settings  # also where it equals the default
    assert (chosen.gamma, chosen.memory) == (0.95, 30_000)


@pytest.mark.parametrize("cores, games", [(1, 8), (4, 8), (8, 8), (9, 9), (16, 16), (128, 32), (None, 8)])
def test_the_number_of_games_follows_the_machine(cores, games, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert parse_args(["--double"]).settings.envs == games
    assert parse_args(["--envs", "5"]).settings.envs == 5
    assert parse_args(["--preset", "tutorial"]).settings.envs == 1


def test_a_run_keeps_the_number_of_games_it_began_with(tmp_path, monkeypatch):
    """Else a checkpoint from a machine with more cores could not be continued."""
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    flags = ["--runs", str(tmp_path), "--name", "a", "--memory", "4000", "--threads", "1"]
    assert main([*flags, "--steps", "12"]) == 0
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert main(["--resume", str(tmp_path / "a"), "--steps", "24"]) == 0
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["envs"] == 12


def test_double_names_the_rules():
    assert parse_args([]).settings.double == "single"
    assert parse_args(["--double"]).settings.double == "tutorial"
    assert parse_args(["--double", "hasselt"]).settings.double == "hasselt"


def test_a_new_run_takes_the_next_free_name(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--steps", "4", "--runs", "all"]
    for expected in ("tutorial-1", "tutorial-2"):
        assert main(["--double", *flags]) == 0
        assert (tmp_path / "all" / expected / "last.pt").exists()
    assert main(["--name", "mine", *flags]) == 0
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["mine", "tutorial-1", "tutorial-2"]


def test_force_replaces_a_run_and_leaves_nothing_of_it(toy, tmp_path, capsys):
    old = tmp_path / "mine"
    old.mkdir()
    for name in ("settings.json", "exams.json", "evaluation-best-noop.json", "episodes.csv", "best.pt", "rewards.png"):
        (old / name).write_text("old")
    assert main([*TINY, "--steps", "40", "--runs", str(tmp_path), "--name", "mine", "--force"]) == 0
    assert not (old / "evaluation-best-noop.json").exists() and not (old / "exams.json").exists()
    assert json.loads((old / "settings.json").read_text())["steps"] == 40 and checkpoint(old)["count"]["steps"] == 40


def printed_command(flag, out):
    """The arguments a shell would make of the line that a run prints at its end."""
    return shlex.split(re.search(rf"python mario_ddqn\.py ({flag} .*)", out)[1])


def test_the_printed_commands_survive_a_space_in_the_folders_name(toy, tmp_path, capsys):
    train(tmp_path / "a run", "--steps", "30")
    out = capsys.readouterr().out
    for flag in ("--resume", "--evaluate", "--watch"):
        assert parse_args(printed_command(flag, out)).typed[flag[2:]] == str(tmp_path / "a run")


@pytest.mark.parametrize("limit, flags", [("steps", ["--steps", "40"]), ("minutes", ["--steps=0", "--minutes=1e-4"]),
                                          ("episodes", ["--steps", "0", "--episodes", "3"])])
def test_the_printed_command_lifts_the_limit_that_ended_the_run(limit, flags, toy, tmp_path, capsys):
    train(tmp_path / "run", *flags)
    again = parse_args(printed_command("--resume", capsys.readouterr().out))
    count = checkpoint(tmp_path / "run")["count"]
    reached = {"steps": count["steps"], "minutes": count["seconds"] / 60, "episodes": 3}[limit]
    assert again.typed.get(limit, -1) == 0 or again.typed.get(limit, -1) > reached


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_cleanly_and_the_printed_command_continues(number, tmp_path, capsys, monkeypatch):
    flags = [*TINY, "--steps", "0", "--name", "run", "--runs", "all", "--double"]
    process = subprocess.Popen([sys.executable, "-u", str(PROGRAM), *flags], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        first = process.stderr.read(1)  # waits for the bar: from then on it plays
        assert first, process.stdout.read()
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + number and "Traceback" not in err
    folder = tmp_path / "all" / "run"
    with Image.open(folder / "rewards.png") as picture:
        picture.load()
    played = checkpoint(folder)["count"]["steps"]
    monkeypatch.chdir(tmp_path)
    assert main([*printed_command("--resume", out), "--steps", str(played + 20)]) == 0
    assert checkpoint(folder)["count"]["steps"] == played + 20


# ===== 7. Evaluation, clips, plots

@pytest.fixture(scope="session")
def walker(tmp_path_factory, tiny):
    """A network file that always walks to the right, into the first Goomba."""
    def make(folder):
        content = checkpoint(tiny, "best.pt")
        for weight in content["local_net"].values():
            weight.zero_()
        content["local_net"]["fc.2.bias"][RIGHT] = 1
        torch.save(content, folder / "walker.pt")
    return once(tmp_path_factory, "walker", make) / "walker.pt"


@pytest.fixture(scope="session")
def walk():
    """What walking to the right comes to: (return, steps, x)."""
    env, total, length, over = m.make_env(), 0.0, 0, False
    env.reset()
    while not over:
        _, reward, over, _, info = env.step(RIGHT)
        total, length = total + reward, length + 1
    env.close()
    return total, length, info["x_pos"]


def test_without_noise_one_episode_is_played_and_no_rate_is_given(walker, walk, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(["--evaluate", str(walker), "--episodes", "7", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["episodes"] == 1 and result["noise"] == "none" and result["cleared"] == 0
    assert not [key for key in result if "rate" in key or "wilson" in key]
    (episode,) = result["results"]
    assert (episode["return"], episode["length"], episode["end_x"], episode["end"]) == (*walk, "died")
    assert "%" not in capsys.readouterr().out


def test_with_noise_every_episode_and_the_interval_are_written(walker, walk, tmp_path, capsys):
    net = shutil.copy(walker, tmp_path / "net.pt")
    assert main(["--evaluate", str(net), "--noise", "noop", "--episodes", "4", "--seed", "3"]) == 0
    (out,) = tmp_path.glob("*.json")
    result = json.loads(out.read_text())
    assert (result["episodes"], result["noise"], result["cleared"], result["seed"]) == (4, "noop", 0, 3)
    assert result["clear_rate"] == 0 and result["wilson_95"] == pytest.approx([0, 1.96 ** 2 / (4 + 1.96 ** 2)])
    results = result["results"]
    assert [r["episode"] for r in results] == [0, 1, 2, 3] and {r["end"] for r in results} == {"died"}
    assert result["mean_return"] == pytest.approx(np.mean([r["return"] for r in results]))
    assert len({r["length"] for r in results}) > 1 and out.name in capsys.readouterr().out


def test_the_clear_rate_and_its_interval(walker, tmp_path, monkeypatch, capsys):
    def play(q_values, episodes, *rest, **more):
        return [{"episode": k, "return": 10.0 * k, "length": 300, "furthest_x": 3000 + k, "end_x": 3000 + k,
                 "end": "died" if k < 10 else "cleared", "q": 150.0, "discounted_return": 140.0 + k % 2}
                for k in range(episodes)]
    monkeypatch.setattr(m, "play", play)
    assert main(["--evaluate", str(walker), "--noise", "epsilon", "--out", str(tmp_path / "x.json")]) == 0
    result = json.loads((tmp_path / "x.json").read_text())
    assert (result["episodes"], result["cleared"], result["clear_rate"]) == (100, 90, 0.9)
    assert result["wilson_95"] == pytest.approx([0.8256, 0.9448], abs=5e-5)
    assert result["mean_return"] == pytest.approx(495) and result["mean_furthest_x"] == pytest.approx(3049.5)
    assert (result["q"], result["discounted_return"]) == (150, 140.5)
    out = capsys.readouterr().out
    assert "90 of 100" in out and "150 points" in out and "140" in out


@pytest.mark.parametrize("successes, n, low, high", [
    (90, 100, 0.8256, 0.9448), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634),
    (1, 20, 0.0089, 0.2361)])
def test_wilsons_interval(successes, n, low, high):
    assert m.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_a_run_can_be_evaluated_by_its_folder(tiny, toy, tmp_path, capsys):
    run = shutil.copytree(tiny, tmp_path / "run")
    assert main(["--evaluate", str(run), "--noise", "sticky", "--episodes", "3"]) == 0
    assert [path.parent for path in tmp_path.rglob("evaluation*.json")] == [run]


@pytest.mark.parametrize("ending", ["gif", "mp4"])
def test_a_recorded_clip_can_be_opened(ending, walker, walk, tmp_path, capsys):
    clip = tmp_path / f"clip.{ending}"
    assert main(["--watch", str(walker), "--record", str(clip)]) == 0
    if ending == "gif":
        with Image.open(clip) as picture:
            size, frames, first = picture.size, picture.n_frames, np.array(picture.convert("RGB"))
    else:
        video = cv2.VideoCapture(str(clip))
        size = tuple(int(video.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        frames, first = 0, None
        while (got := video.read())[0]:
            frames, first = frames + 1, got[1][:, :, ::-1] if first is None else first
        video.release()
        assert walk[1] <= frames <= walk[1] + 40
    assert size == (256, 264) and frames > 10
    env = JoypadSpace(m.MaxAndSkipEnv(bare_game()), RIGHT_ONLY)
    env.reset()
    shown = env.step(RIGHT)[0]
    env.close()
    assert np.abs(first[:240].astype(int) - shown).mean() < 12  # the game's picture, red is red (few colours, or lossy)
    assert [path.name for path in tmp_path.iterdir()] == [clip.name] and str(clip) in capsys.readouterr().out


def test_record_alone_is_enough_with_a_trained_network(walker, toy, tmp_path, monkeypatch):
    assert parse_args(["--record", str(tmp_path / "x.gif")]).mode in ("watch", "record")


def test_the_window_shows_the_game_and_q_quits(walker, monkeypatch, capsys):
    shown = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "imshow", lambda title, picture: shown.append(picture))
    monkeypatch.setattr(cv2, "waitKey", lambda _: ord("q") if len(shown) == 3 else -1)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: 1.0)
    assert main(["--watch", str(walker)]) in (0, 130)
    assert len(shown) == 3 and shown[0].dtype == np.uint8 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("ending, x", [("png", "episodes"), ("png", "steps"), ("png", "minutes"), ("svg", "episodes"),
                                       ("pdf", "steps")])
def test_two_runs_are_plotted(ending, x, tiny, tmp_path, capsys):
    other, out = shutil.copytree(tiny, tmp_path / "other"), tmp_path / f"both.{ending}"
    settings = json.loads((other / "settings.json").read_text())
    (other / "settings.json").write_text(json.dumps({**settings, "double": "tutorial"}))
    assert main(["--plot", str(tiny), str(other), "--out", str(out), "--x", x]) == 0
    if ending == "png":
        with Image.open(out) as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(10 ** 6)) > 20
    else:
        assert out.read_bytes()[:5] == {"svg": b"<?xml", "pdf": b"%PDF-"}[ending]


def episodes_of(noise, count=3000):
    return (m.Episode(np.random.default_rng([5, k]), noise) for k in range(count))


def test_noop_noise_idles_0_to_30_steps_and_then_obeys():
    idle = Counter()
    for episode in episodes_of("noop"):
        actions = [episode.disturb(2) for _ in range(34)]
        steps = actions.index(2)
        assert actions == [0] * steps + [2] * (34 - steps)
        idle[steps] += 1
    assert set(idle) == set(range(31))
    assert sum((n - 3000 / 31) ** 2 / (3000 / 31) for n in idle.values()) < 30 + 5 * math.sqrt(60)


def test_epsilon_noise_replaces_one_action_in_twenty():
    (episode,) = episodes_of("epsilon", 1)
    wanted = np.random.default_rng(0).integers(5, size=40_000)
    got = np.array([episode.disturb(action) for action in wanted])
    assert np.mean(got != wanted) == pytest.approx(0.05 * 4 / 5, abs=0.005)
    assert (np.abs(np.bincount(got[got != wanted], minlength=5) / (got != wanted).sum() - 0.2) < 0.04).all()


def test_sticky_noise_repeats_the_last_action_one_time_in_four():
    (episode,) = episodes_of("sticky", 1)
    wanted = np.arange(40_000) % 5
    got = np.array([episode.disturb(action) for action in wanted])
    stuck = got[1:] != wanted[1:]
    assert (got[1:][stuck] == got[:-1][stuck]).all()
    assert stuck.mean() == pytest.approx(0.25, abs=0.01)


def test_without_noise_every_action_is_obeyed():
    for episode in episodes_of("none", 5):
        assert [episode.disturb(action) for action in (0, 4, 2, 2, 1)] == [0, 4, 2, 2, 1]


def brightness_policy(states):
    """Q-values that depend on the newest frame, so that one disturbed action changes all that follows."""
    wanted = (states[:, -1, 40, 40] * 255).round().astype(int) % 5
    return np.eye(5, dtype=np.float32)[wanted]


@pytest.mark.parametrize("noise", ["noop", "epsilon", "sticky"])
def test_play_repeats_itself_for_a_seed_and_not_for_another(toy, noise):
    play = partial(m.play, brightness_policy, 24, noise)
    assert play(7) == play(7) != play(8)
    assert [r["episode"] for r in play(7)] == list(range(24))


@pytest.mark.parametrize("noise", ["noop", "epsilon", "sticky"])
def test_an_episodes_noise_does_not_depend_on_the_number_of_emulators(toy, noise):
    many = m.play(brightness_policy, 20, noise, 7)
    assert m.play(brightness_policy, 20, noise, 7, watch=lambda *_: None) == many  # one emulator
    for fewer in (1, 3, 9):
        assert m.play(brightness_policy, fewer, noise, 7) == many[:fewer]
    assert len({(r["return"], r["length"]) for r in many}) > 3


def test_play_repeats_itself_in_the_real_game():
    def walks(states):
        return np.eye(5, dtype=np.float32)[[RIGHT] * len(states)]
    first, second = m.play(walks, 2, "epsilon", 4), m.play(walks, 2, "epsilon", 4, watch=lambda *_: None)
    assert first == second and first[0] != {**first[1], "episode": 0}


def test_the_network_that_comes_with_the_program_clears_the_level():
    """Greedily, on the real game. Another processor rounds in another way and so plays other games: most, not all."""
    path, q_values, settings = m.find_network(str(m.TRAINED))
    assert path.stat().st_size < 4e6
    results = m.play(q_values, 6, "noop", 1, settings, max_steps=500)
    assert sum(result["end"] == "cleared" for result in results) >= 3, results


def always(action):
    return lambda states: np.eye(5, dtype=np.float32)[[action] * len(states)]


def test_play_tells_how_an_episode_ended(toy, monkeypatch):
    (cleared,) = m.play(always(4), 1, "none", 0)
    for end, expected in ((cleared, {"return": 63.0, "length": 7, "furthest_x": 103, "end_x": 103, "end": "cleared"}),
                          (died := m.play(always(2), 1, "none", 0)[0],
                           {"return": 24.0, "length": 12, "furthest_x": 64, "end_x": 64, "end": "died"})):
        assert end == {"episode": 0, **expected, "q": 1.0, "discounted_return": end["discounted_return"]}
    assert cleared["discounted_return"] != died["discounted_return"]
    (late,) = m.play(always(1), 1, "none", 0, max_steps=9)
    assert (late["end"], late["length"]) == ("out of time", 9)
    monkeypatch.setattr(toy, "cut", 5)
    (cut,) = m.play(always(1), 1, "none", 0)
    assert (cut["end"], cut["length"]) == ("out of time", 5)


def test_the_promise_is_the_q_of_the_greedy_actions_beside_the_discounted_return_that_followed():
    chosen = [(1.0, 2.0), (None, 3.0), (5.0, 4.0)]  # the second action was noise
    # G_2 = 4, G_1 = 3 + 4/2 = 5, G_0 = 2 + 5/2 = 4.5
    assert m.promise(chosen, 0.5, cut=False) == {"q": 3.0, "discounted_return": 4.25}
    assert m.promise(chosen, 0.5, cut=True) == {"q": None, "discounted_return": None}  # too short to tell
    long = m.promise([(k, 1.0) for k in range(150)], 0.5, cut=True)  # only the first 50 returns are whole
    assert long["q"] == 24.5 and long["discounted_return"] == pytest.approx(2, abs=1e-9)
    assert m.means([{"q": 1.0, "discounted_return": 3.0}, {"q": None, "discounted_return": None},
                    {"q": 2.0, "discounted_return": 4.0}]) == {"q": 1.5, "discounted_return": 3.5}


@pytest.mark.parametrize("noise", ["none", "epsilon"])
def test_an_episode_tells_its_promise_in_points(toy, monkeypatch, noise):
    played, step = [], toy.step
    monkeypatch.setitem(m.NOISES, "epsilon", {"epsilon": 0.5})
    monkeypatch.setattr(toy, "step", lambda self, action: played.append((action, step(self, action))) or played[-1][1])
    (result,) = m.play(lambda states: 3 * always(2)(states), 1, noise, 3, {"gamma": 0.8, "reward_scale": 0.1})
    rewards, returns = [reward for _, (_, reward, *_) in played], []
    for t in range(len(rewards)):
        returns.append(sum(0.8 ** k * reward for k, reward in enumerate(rewards[t:])))
    own = [returns[t] for t, (action, _) in enumerate(played) if action == 2]
    assert result["q"] == pytest.approx(30) and result["discounted_return"] == pytest.approx(np.mean(own))
    assert (len(own) < len(returns)) == (noise == "epsilon")


# ===== 8. Bad input: one line, exit code 2, nothing written

def tree(folder):
    """Everything below the folder: name -> fingerprint of its content."""
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """refused(argv, *words): main refuses with one line that holds these words, before any game is started."""
    monkeypatch.chdir(tmp_path)

    def no_game(*_):
        raise AssertionError("a game was started")

    def check(argv, *words):
        before = tree(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(m, "make_env", no_game)
            capsys.readouterr()
            with warnings.catch_warnings(record=True) as warned:  # they would be lines on stderr, too
                warnings.simplefilter("always")
                code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert not [str(warning.message) for warning in warned]
        assert code == 2 and tree(tmp_path) == before
        assert len(err.splitlines()) == 1 and err.endswith("\n") and err.startswith("mario_ddqn.py: ")
        assert "Traceback" not in out + err and not [word for word in words if str(word) not in err]

    return check


@pytest.mark.parametrize("flag, values", [
    ("--gamma", "2 -0.1 nan x"), ("--n-step", "0 101 1.5 x"), ("--lr", "0 -1 2 nan inf"), ("--batch", "0 -3 x 1e3"),
    ("--train-every", "0 x"), ("--copy", "0 -1 2.5"), ("--memory", "0 -1 x"), ("--learn-start", "0 x"),
    ("--reward-scale", "0 -1 nan inf"), ("--eps-start", "1.1 -1 nan"), ("--eps-decay", "2 -1 x"),
    ("--eps-min", "-0.1 2"), ("--hold", "-1 x"), ("--episodes", "0 -5 ten"), ("--steps", "-1 x"),
    ("--minutes", "-1 nan x inf"), ("--until-clear", "2 -1"), ("--eval-every", "-1 x"), ("--eval-episodes", "0"),
    ("--checkpoint-minutes", "-1 nan"), ("--envs", "-1 1000 x"), ("--seed", "-1 x"), ("--threads", "-1 x"),
    ("--double", "foo"), ("--noise", "foo"), ("--train-noise", "foo noop, noop,foo"),
    ("--flag-bonus", "-1 x"), ("--average", "-1 x"), ("--lr-switch", "-1 x 1.5 1, 1,x"),
    ("--lr-late", "0 2 x 1e-5,0"),
    ("--stage", "9-9 1-5 0-1 x 1-1-1"), ("--device", "tpu"), ("--precision", "float16"), ("--preset", "foo"),
    ("--x", "hours"), ("--record", "clip.txt clip .gif")])
def test_a_value_out_of_range_is_refused(flag, values, refused):
    for value in values.split():
        refused([f"{flag}={value}"], flag)
        refused([flag, value], flag)


@pytest.mark.parametrize("argv", [["--foo"], ["foo"], ["--gam", "0.5"], ["--gamma"], ["--plot"], ["--resume"],
                                  ["--record"], ["--doubel"]])
def test_an_unknown_or_unfinished_flag_is_refused(argv, refused):
    refused(argv, argv[0])


@pytest.mark.parametrize("one, two", [
    (["--evaluate", "a"], ["--plot", "b"]), (["--resume", "a"], ["--watch", "b"]), (["--plot", "a"], ["--resume", "b"]),
    (["--evaluate", "a"], ["--watch", "b"]), (["--evaluate", "a"], ["--record", "b.gif"]),
    (["--resume", "a"], ["--record", "b.gif"])])
def test_two_modes_at_once_are_refused(one, two, refused):
    refused([*one, *two], one[0], two[0])


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def bad_file(kind, path, good, marker):
    if kind == "text":
        path.write_text("not a network\n" * 50)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(good.read_bytes()[:good.stat().st_size // 2])
    elif kind == "half a zip's end":
        path.write_bytes(good.read_bytes()[:-30])
    elif kind == "hostile pickle":
        path.write_bytes(pickle.dumps(Hostile(marker)))
    elif kind == "hostile torch file":
        torch.save({"format": 1, "settings": Hostile(marker), "local_net": Hostile(marker)}, path)
    elif kind == "another torch file":
        torch.save(torch.zeros(3), path)
    elif kind == "another dictionary":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "another network":
        torch.save({**torch.load(good, weights_only=True), "local_net": nn.Linear(2, 2).state_dict()}, path)


BAD_FILES = ["missing", "text", "empty", "truncated", "half a zip's end", "hostile pickle", "hostile torch file",
             "another torch file", "another dictionary", "another network"]


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("mode", ["evaluate", "watch", "resume"])
def test_a_file_that_is_no_network_is_refused(kind, mode, refused, tiny, tmp_path):
    marker = tmp_path / "executed"
    if mode == "resume":
        shutil.copytree(tiny, tmp_path / "run", ignore=shutil.ignore_patterns("last.pt"))
        bad_file(kind, tmp_path / "run" / "last.pt", tiny / "last.pt", marker)
        refused(["--resume", "run", "--steps", "400"], "last.pt")
    else:
        bad_file(kind, tmp_path / "net.pt", tiny / "best.pt", marker)
        refused([f"--{mode}", "net.pt", *(["--record", "x.gif"] if mode == "watch" else [])], "net.pt")
    assert not marker.exists()


def test_the_hostile_file_would_do_harm_if_it_were_trusted(tmp_path):
    bad_file("hostile pickle", tmp_path / "x", None, tmp_path / "marker")
    pickle.loads((tmp_path / "x").read_bytes())
    assert (tmp_path / "marker").exists()


def test_a_network_instead_of_a_checkpoint_cannot_be_resumed(refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "run")
    shutil.copy(tiny / "best.pt", tmp_path / "run" / "last.pt")
    refused(["--resume", "run", "--steps", "400"], "last.pt")


def test_a_folder_without_a_network_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(["--evaluate", "empty"], "empty")
    refused(["--watch", "empty", "--record", "x.gif"], "empty")
    refused(["--resume", "empty"], "empty")
    refused(["--resume", "nowhere"], "nowhere")


def test_watching_without_a_display_points_to_record(refused, walker, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    refused(["--watch", walker], "--record")


def test_plot_says_what_is_missing(refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "run")
    (tmp_path / "file").write_text("x")
    refused(["--plot", "run"], "--out")
    refused(["--plot", "run", "--out", "x.txt"], "--out")
    refused(["--plot", "run", "--out", "x"], "--out")
    refused(["--plot", "run", "nowhere", "--out", "x.png"], "nowhere")
    refused(["--plot", "file", "--out", "x.png"], "file")
    (tmp_path / "run" / "episodes.csv").unlink()
    refused(["--plot", "run", "--out", "x.png"], "run")


@pytest.mark.parametrize("damage", ["", "{", "[]", "\xff\xfe"])
def test_a_run_with_damaged_settings_is_not_plotted(damage, refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "run")
    (tmp_path / "run" / "settings.json").write_bytes(damage.encode("latin-1"))
    refused(["--plot", "run", "--out", "x.png"], "run")


def test_an_existing_run_is_kept(refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "runs" / "mine")
    refused(["--name", "mine"], "mine", "--force", "--resume")


@pytest.mark.parametrize("flags", [["--gamma", "0.9"], ["--double"], ["--envs", "3"], ["--seed", "0"], ["--copy", "7"],
                                   ["--memory", "5000"], ["--preset", "quick"], ["--train-noise", "none"],
                                   ["--precision", "bfloat16"], ["--stage", "1-2"]])
def test_a_setting_of_a_run_cannot_change_on_resume(flags, refused, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "run")
    refused(["--resume", "run", *flags], flags[0])


def test_a_memory_larger_than_the_machines_is_refused(refused, tiny, tmp_path):
    refused(["--memory", 10 ** 9], "--memory", "GB")
    refused(["--memory", 10 ** 9, "--name", "new"], "--memory")


def test_cuda_is_refused_where_there_is_none(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(["--device", "cuda"], "--device")


def test_a_run_that_is_refused_overwrites_nothing_even_with_force(refused, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.copytree(tiny, tmp_path / "runs" / "mine")
    refused(["--name", "mine", "--force", "--memory", 10 ** 9], "--memory")
    refused(["--name", "mine", "--force", "--device", "cuda"], "--device")


def test_runs_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "runs").write_text("a file")
    refused(["--double"], "runs")
    refused(["--name", "mine"], "runs")
    refused(["--name", "mine", "--force"], "runs")


@pytest.mark.parametrize("argv", [
    ["--plot", "RUN", "--out", "nowhere/x.png"], ["--evaluate", "RUN", "--out", "nowhere/x.json"],
    ["--evaluate", "RUN", "--noise", "noop", "--out", "nowhere/x.json"],
    ["--watch", "RUN", "--record", "nowhere/x.gif"], ["--watch", "RUN", "--record", "nowhere/x.mp4"]])
def test_a_file_in_a_folder_that_does_not_exist_is_refused_before_anything_is_played(argv, refused, tiny):
    refused([tiny if word == "RUN" else word for word in argv], "nowhere")


def test_a_memory_that_can_never_hold_enough_to_start_learning_is_refused(refused):
    refused(["--memory", "1000", "--learn-start", "2000"], "--learn-start")
    refused(["--memory", "1000"], "--learn-start")  # more than the default asks for


def test_every_switch_of_the_learning_rate_needs_a_rate(refused):
    refused(["--lr-switch", "10,20"], "--lr-late")
    refused(["--lr-late", "1e-5,1e-6"], "--lr-switch")


@pytest.mark.parametrize("switch, late", [("10,20", "1e-5,1e-6"), ([10, 20], [1e-5, 1e-6]), (10, 1e-5)])
def test_the_switches_are_read_in_the_forms_of_today_and_of_older_runs(switch, late):
    args = m.parse_args(["--memory", "4000"])
    args.lr_switch, args.lr_late = switch, late
    assert m.make_agent(args).lr_late == ({10: 1e-5} if "20" not in str(switch) else {10: 1e-5, 20: 1e-6})


def test_a_plot_names_no_setting_as_different_that_is_only_written_otherwise(tmp_path, monkeypatch):
    defaults, labels = vars(m.parse_args([])), []
    for name, more in (("old", {"lr_switch": 40000, "lr_late": 5e-05}), ("new", {"seed": 1})):
        (tmp_path / name).mkdir()
        settings = {key: defaults[key] for key in m.DEFAULTS} | more
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
        with open(tmp_path / name / "episodes.csv", "w", newline="") as file:
            csv.DictWriter(file, m.COLUMNS).writeheader()
            csv.DictWriter(file, m.COLUMNS).writerow(dict.fromkeys(m.COLUMNS, 1))
    monkeypatch.setattr(m, "fill", lambda text, width: labels.append(text) or text)
    m.plot_rewards([tmp_path / "old", tmp_path / "new"], tmp_path / "curves.png")
    assert labels == ["seed 0", "seed 1"]


@pytest.mark.parametrize("flags", [["--envs", "64", "--memory", "1000", "--n-step", "20"],
                                   ["--envs", "8", "--batch", "1", "--learn-start", "1", "--n-step", "100"]])
def test_a_memory_without_one_whole_transition_ends_in_no_traceback(flags, toy, tmp_path, capsys, monkeypatch):
    """Either the settings are refused, or the agent waits until it can learn."""
    monkeypatch.setattr(toy, "death_at", 10 ** 6)
    monkeypatch.setattr(toy, "clear_at", 10 ** 9)
    code = main([*TINY, *flags, "--steps", "1400", "--train-every", "50", "--runs", str(tmp_path / "runs")])
    assert code in (0, 2) and "Traceback" not in capsys.readouterr().err
