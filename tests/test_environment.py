"""Section 2 of mario_ddqn.py, the environment. The oracle is a second, plain game beside the fast one.

tests/recording.npz holds real play of gym-super-mario-bros 7.4 and the reward that it pays itself: for every step the
buttons and a checksum of its pictures, for every frame reward, x, clock and how the episode ended."""
import math
import sys
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import cv2
import numpy as np
import pytest
from conftest import ROOT, m
from packaging.requirements import Requirement  # comes with pytest

from mario_ddqn import RIGHT_ONLY, Episode, gym

BUTTONS = {"NOOP": 0, "A": 1, "B": 2, "left": 64, "right": 128}  # one bit each, as the emulator takes them
RUN, RUN_AND_JUMP = 3, 4  # RUN meets the first Goomba: the shortest real episode there is


# ===== The wrappers, beside a plain game

def plain_84(rgb, line):
    """(240, 256, 3) uint8 in RGB -> (84, 84) uint8."""
    grey = cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (84, 110), interpolation=cv2.INTER_AREA)[18:102]
    return np.concatenate([np.full((4, 84), 255, np.uint8), small[4:]]) if line else small


class PlainGame:
    """The definition of a state and a reward, one thing after the other, every frame copied."""

    def __init__(self, show_jump):
        self.game, self.show_jump = m.make_game("1-1"), show_jump

    def reset(self):
        self.raw = [self.game.reset()[0].copy()]
        self.small = [np.zeros((84, 84), np.uint8)] * 3 + [plain_84(self.raw[0], False)]
        return np.stack(self.small[-4:]).astype(np.float32) / np.float32(255)

    def step(self, action):
        buttons, total = sum(BUTTONS[name] for name in RIGHT_ONLY[action]), 0.0
        for _ in range(4):
            frame, reward, terminated, truncated, info = self.game.step(buttons)
            self.raw, total = [self.raw[-1], frame.copy()], total + reward
            if terminated or truncated:
                break
        self.small.append(plain_84(np.maximum(*self.raw), self.show_jump and "A" in RIGHT_ONLY[action]))
        return np.stack(self.small[-4:]).astype(np.float32) / np.float32(255), total, terminated, truncated, info


@pytest.mark.parametrize("show_jump", [False, True])
def test_the_whole_chain_equals_the_plain_game_over_real_steps(show_jump):
    """A death, a reset while the jump button is down, random actions. The states are compared at the end: none may
    have changed when the game went on."""
    env, plain, rng, pairs, ends = m.make_env("1-1", show_jump), PlainGame(show_jump), np.random.default_rng(3), [], []
    assert env.action_space.n == len(RIGHT_ONLY) == 5
    for actions in ([RUN] * 60, [RUN_AND_JUMP] * 12, rng.integers(5, size=50).tolist()):
        pairs.append((env.reset()[0], plain.reset()))
        np.testing.assert_array_equal(pairs[-1][0], pairs[0][0])  # every episode starts in the same state
        for action in actions:
            state, reward, *end, info = env.step(action)
            plain_state, plain_reward, *plain_end, plain_info = plain.step(action)
            np.testing.assert_array_equal(picture := info.pop("picture")[:, :, :3], plain.raw[-1][:, :, ::-1])
            np.testing.assert_array_equal(m.emulator_picture(plain.raw[-1])[:, :, :3], picture)  # a frame of one's own
            assert (reward, end, info) == (plain_reward, plain_end, plain_info)
            pairs.append((state, plain_state))
            if end[0]:
                ends.append(reward)
                break
    env.close()
    assert len(pairs) > 75 and ends[0] < 0
    for state, plain_state in pairs:
        assert env.observation_space.contains(state) and state.dtype == np.float32
        np.testing.assert_array_equal(state, plain_state)


class Screen(gym.Env):
    """A game that draws into one place over and over, as the emulator does. Frame k has its own colours, pays
    10**k, and frame `last` ends the episode."""

    def __init__(self, last, truncates):
        self.last, self.truncates, self.buffer = last, truncates, np.zeros((240, 256, 4), np.uint8)

    def picture(self, k):
        return np.random.default_rng(k).integers(0, 256, (240, 256, 3), dtype=np.uint8)  # RGB

    def reset(self, **kwargs):
        self.frame = 0
        self.buffer[:, :, 2::-1] = self.picture(0)
        return self.buffer[:, :, ::-1][:, :, 1:], {}

    def step(self, action):
        assert self.frame < self.last, "stepped after the end"
        self.frame += 1
        self.buffer[:, :, 2::-1] = self.picture(self.frame)
        end = self.frame == self.last
        return (self.buffer[:, :, ::-1][:, :, 1:], 10.0 ** self.frame, end and not self.truncates,
                end and self.truncates, {"k": self.frame})


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("last", [1, 2, 4, 5, 7, 8])
def test_a_step_is_four_frames_or_fewer_when_the_episode_ends(last, truncates):
    game = Screen(last, truncates)
    env = m.MaxAndSkipEnv(game)
    for _ in range(2):  # nothing of the first episode shows in the second
        np.testing.assert_array_equal(env.reset()[0][:, :, 2::-1], game.picture(0))
        terminated = truncated = False
        while not (terminated or truncated):
            begin = game.frame
            obs, reward, terminated, truncated, info = env.step(0)
        assert begin == (last - 1) // 4 * 4 and game.frame == info["k"] == last
        assert (terminated, truncated) == (not truncates, truncates)
        assert reward == sum(10.0 ** k for k in range(begin + 1, last + 1))
        np.testing.assert_array_equal(obs[:, :, 2::-1], np.maximum(game.picture(last - 1), game.picture(last)))


# ===== The two generations of packages: the same frames, rewards and ends

def replay(buttons):
    """One episode anew: the checksum of every step, and all its frames as (reward, x, clock, 1: dead, 2: cleared)."""
    env = m.make_game("1-1")
    start, checksums, frames = zlib.crc32(np.ascontiguousarray(env.reset()[0])), [], []
    for pressed in buttons:
        checksum = 0
        for _ in range(4):
            obs, reward, terminated, truncated, info = env.step(int(pressed))
            checksum = zlib.crc32(cv2.cvtColor(m.emulator_picture(obs), cv2.COLOR_BGRA2RGB), checksum)
            frames.append((reward, info["x_pos"], info["time"], terminated * (2 if info["flag_get"] else 1)))
            if terminated:
                break
        checksums.append(zlib.crc32(checksum.to_bytes(4, "big"), start))
    return checksums, frames


def test_either_generation_plays_the_recording_frame_by_frame():
    """A clear and four deaths. The recording's last episode, until the clock runs out, is too long for here."""
    saved = np.load(ROOT / "tests" / "recording.npz")
    played = np.split(saved["buttons"], saved["starts"][1:])[:5]
    with ThreadPoolExecutor(2) as pool:
        checksums, frames = (np.concatenate(parts) for parts in zip(*pool.map(replay, played), strict=True))
    np.testing.assert_array_equal(checksums, saved["checksums"][:len(checksums)])
    for column, name in zip(frames.T, ("reward", "x", "clock", "end"), strict=True):
        np.testing.assert_array_equal(column, saved[name][:len(column)], name)
    assert Counter(frames[:, 3].tolist()) == {0: len(frames) - 5, 1: 4, 2: 1} and len(frames) > 2000
    assert frames[:, 0].min() == -15 and (np.concatenate(played) & BUTTONS["left"]).any()


class Walk(gym.Env):
    """Frames whose x, clock and death are given."""

    def __init__(self, *frames):
        self.frames = [dict(zip(("x_pos", "time", "is_dying", "is_dead"), frame, strict=True)) for frame in frames]

    def reset(self, **kwargs):
        self.left = list(self.frames)
        return np.zeros(1), self.left.pop(0)

    def step(self, action):
        return np.zeros(1), 999.0, False, False, self.left.pop(0)


@pytest.mark.parametrize("before, after, reward", [
    ((40, 400), (43, 400, False, False), 3), ((40, 400), (38, 400, False, False), -2),
    ((40, 400), (42, 399, False, False), 1), ((40, 400), (45, 400, False, False), 5),
    ((40, 400), (46, 400, False, False), 0), ((40, 300), (41, 400, False, False), 1),  # too long a step; a new clock
    ((40, 400), (42, 400, True, False), -15), ((40, 400), (42, 400, False, True), -15)])
def test_the_tutorials_reward_is_made_from_x_clock_and_death(before, after, reward):
    env = m.TutorialReward(Walk((*before, False, False), after, after))
    for _ in range(2):  # the second time after a reset
        env.reset()
        assert env.step(0)[1] == reward
    assert env.step(0)[1] == -15 * (after[2] or after[3])  # the next frame counts from this one


def wanted(python):
    """{name: specifiers} that requirements.txt asks for on this Python, such as 3.12."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    found = map(Requirement, filter(None, lines))
    return {one.name: one.specifier for one in found
            if not one.marker or one.marker.evaluate({"python_version": python})}


def test_the_requirements_name_one_generation_for_every_python_and_are_installed():
    for python, generation in (("3.10", "7.4.0"), ("3.12", "7.4.0"), ("3.13", "9.1.0"), ("3.14", "9.1.0")):
        assert generation in wanted(python)["gym-super-mario-bros"]
        assert len(wanted(python).keys() & {"gym", "gymnasium"}) == 1 and "needs-python" not in wanted(python)
    assert "needs-python" in wanted("3.9") and "needs-python" in wanted("3.15")
    for name, specifier in wanted(f"3.{sys.version_info.minor}").items():
        assert version(name) in specifier, f"{name} {version(name)} is not {specifier}: pip install -r requirements.txt"


# ===== Episode: its noise and what it has come to

def test_an_episode_keeps_return_furthest_x_the_steps_since_and_whether_it_was_cleared():
    episode, seen = Episode(np.random.default_rng(0)), []
    for reward, x, flag in ((3.0, 43, False), (-1.0, 42, False), (1.0, 43, False), (2.0, 45, True), (-1.0, 44, False)):
        episode.add(reward, {"x_pos": x, "flag_get": flag})
        seen.append((episode.total_reward, episode.furthest_x, episode.standing, episode.cleared))
    assert seen == [(3, 43, 0, False), (2, 43, 1, False), (3, 43, 2, False), (5, 45, 0, True), (4, 45, 1, True)]


def test_noop_noise_idles_0_to_30_steps_and_then_obeys():
    idle = Counter()
    for k in range(3000):
        episode = Episode(np.random.default_rng([5, k]), "noop")
        steps = len(episode.actions)
        assert [episode.apply_noise(2) for _ in range(4)] == [2] * 4 and episode.actions == [0] * steps + [2] * 4
        idle[steps] += 1
    assert set(idle) == set(range(31))
    assert sum((n - 3000 / 31) ** 2 / (3000 / 31) for n in idle.values()) < 30 + 5 * math.sqrt(60)


@pytest.mark.parametrize("noise, share", [("none", 0), ("epsilon", 0.05 * 4 / 5), ("sticky", 0.25), ("random", 0.8)])
def test_noise_replaces_so_many_actions(noise, share):
    episode, chosen = Episode(np.random.default_rng(5), noise), np.arange(40_000) % 5
    got = np.array([episode.apply_noise(action) for action in chosen])
    other = got != chosen
    assert episode.actions == got.tolist() and type(episode.actions[0]) is int
    assert other.mean() == pytest.approx(share, abs=0.006) and (noise != "none" or not other.any())
    assert noise != "sticky" or (got[1:][other[1:]] == got[:-1][other[1:]]).all()
    assert noise != "epsilon" or (np.abs(np.bincount(got[other], minlength=5) / other.sum() - 0.2) < 0.04).all()
    assert noise != "random" or np.mean(got[1:] == got[:-1]) == pytest.approx(0.8 + 0.2 / 5, abs=0.01)
