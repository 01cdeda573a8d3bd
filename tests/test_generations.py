"""Gymnasium's generation of packages (Python 3.13 and newer) beside gym's: the same frames, rewards and ends.

tests/recording.npz holds real play, written with gym-super-mario-bros 7.4 and the reward it pays itself:

    python tests/test_generations.py     writes it anew (Python 3.10 to 3.12), about half a minute
"""

import importlib
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement  # comes with pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mario_ddqn as m

HERE, ROOT = Path(__file__).resolve().parent, Path(m.__file__).resolve().parent
RECORDING = HERE / "recording.npz"
RIGHT, LEFT, DOWN, B, A = 128, 64, 32, 2, 1  # one bit per button of the NES, as the emulator takes them


def play_bytes(env, buttons):
    """One agent step without a wrapper: four frames with these buttons, fewer at the episode's end. Returns the
    checksum of its pictures and, for each frame, (reward, x, clock, 1: dead, 2: cleared)."""
    checksum, frames = 0, []
    for _ in range(4):
        obs, reward, terminated, truncated, info = env.step(int(buttons))
        checksum = zlib.crc32(np.ascontiguousarray(obs), checksum)
        assert not truncated
        frames.append((reward, info["x_pos"], info["time"], terminated * (2 if info["flag_get"] else 1)))
        if terminated:
            break
    return checksum, frames


def record():
    """One episode that the network of this repository clears, then random buttons, each held for a while, through
    deaths until there are more than 2,050 steps."""
    env, rng = m.make_game("1-1"), np.random.default_rng(0)
    assert not isinstance(env, m.TutorialReward), "the recording needs the reward of gym-super-mario-bros 7"
    _, q_values, _ = m.find_network(str(m.TRAINED))
    greedy = []  # what each step of the greedy episode pressed
    agent_env = m.make_env(show_jump=True)
    state, terminated = agent_env.reset()[0], False
    while not terminated:
        action = int(q_values(state[None]).argmax())
        greedy.append(sum({"right": RIGHT, "A": A, "B": B}.get(button, 0) for button in m.RIGHT_ONLY[action]))
        state, _, terminated, _, _ = agent_env.step(action)
    pressed, checksums, frames, starts = [], [], [], []
    while len(pressed) < 2050 or not frames[-1][3]:
        if not frames or frames[-1][3]:
            starts.append(len(pressed))
            checksum = zlib.crc32(np.ascontiguousarray(env.reset()[0]))  # of the first picture of the episode
            held = 0
        if len(starts) == 1:
            buttons = greedy[len(pressed)]
        elif held == 0:
            held = int(rng.integers(1, 13))
            buttons = int(rng.choice([0, RIGHT, RIGHT + A, RIGHT + B, RIGHT + A + B, A, LEFT, LEFT + A, DOWN]))
        held -= 1
        crc, new = play_bytes(env, buttons)
        checksums.append(zlib.crc32(crc.to_bytes(4, "big"), checksum))
        pressed.append(buttons)
        frames += new
    reward, x, clock, end = (np.array(column) for column in zip(*frames, strict=True))
    np.savez_compressed(RECORDING, buttons=np.uint8(pressed), starts=np.int32(starts), checksums=np.uint32(checksums),
                        reward=np.int8(reward), x=np.uint16(x), clock=np.uint16(clock), end=np.uint8(end))
    print(f"{RECORDING}: {len(pressed)} steps, {len(frames)} frames, {len(starts)} episodes, "
          f"{(end == 1).sum()} deaths, {(end == 2).sum()} clears, {RECORDING.stat().st_size} bytes")


def replay(buttons):
    """One episode anew: the checksum of every step and all its frames."""
    env = m.make_game("1-1")
    start, checksums, frames = zlib.crc32(np.ascontiguousarray(env.reset()[0])), [], []
    for pressed in buttons:
        crc, new = play_bytes(env, pressed)
        checksums.append(zlib.crc32(crc.to_bytes(4, "big"), start))
        frames += new
    env.close()
    return checksums, frames


def test_either_generation_plays_the_recording_frame_by_frame():
    saved = np.load(RECORDING)
    assert len(saved["buttons"]) >= 2000 and (saved["end"] == 1).sum() >= 5 and (saved["end"] == 2).sum() == 1
    assert saved["reward"].min() == -15 and saved["reward"].max() > 2 and (saved["buttons"] & LEFT).any()
    with ThreadPoolExecutor(2) as pool:
        episodes = list(pool.map(replay, np.split(saved["buttons"], saved["starts"][1:])))
    checksums, frames = (np.concatenate(parts) for parts in zip(*episodes, strict=True))
    np.testing.assert_array_equal(checksums, saved["checksums"])
    for k, name in enumerate(("reward", "x", "clock", "end")):
        np.testing.assert_array_equal(frames[:, k], saved[name], name)


class Walk(m.gym.Env):
    """Frames whose x, clock and death are given."""

    observation_space, action_space = m.gym.spaces.Box(0, 255, (1,), np.uint8), m.gym.spaces.Discrete(2)

    def __init__(self, *frames):
        self.frames = [{"x_pos": x, "time": clock, "is_dying": dying, "is_dead": dead}
                       for x, clock, dying, dead in frames]

    def reset(self, **kwargs):
        self.left = list(self.frames)
        return np.zeros(1, np.uint8), self.left.pop(0)

    def step(self, action):
        info = self.left.pop(0)
        return np.zeros(1, np.uint8), 999.0, info["is_dead"], False, info


@pytest.mark.parametrize("before, after, reward", [
    ((40, 400), (43, 400, False, False), 3), ((40, 400), (38, 400, False, False), -2),
    ((40, 400), (42, 399, False, False), 1), ((40, 400), (40, 399, False, False), -1),
    ((40, 400), (45, 400, False, False), 5), ((40, 400), (46, 400, False, False), 0),   # no step is that long
    ((900, 400), (40, 400, False, False), 0), ((40, 300), (41, 400, False, False), 1),  # a new life, a new clock
    ((40, 400), (42, 400, True, False), -15), ((40, 400), (42, 400, False, True), -15)])
def test_the_tutorials_reward_is_made_from_x_clock_and_death(before, after, reward):
    env = m.TutorialReward(Walk((*before, False, False), after, after))
    for _ in range(2):  # the second time after a reset
        env.reset()
        assert env.step(0)[1] == reward
    assert env.step(0)[1] == -15 * (after[2] or after[3])  # the next frame counts from this one


def test_a_game_that_is_come_back_to_goes_on_as_it_did(monkeypatch):
    """What tests/benchmarks/slips.py rests on: the emulator's backup, and what the wrappers around it remember."""
    monkeypatch.syspath_prepend(HERE / "benchmarks")
    slips, rng = importlib.import_module("slips"), np.random.default_rng(2)
    before, way, other = rng.integers(3, 5, size=20), rng.integers(3, 5, size=12), [0] * 5

    def walk(env, actions):
        return [(state.tobytes(), reward, over, info["x_pos"], info["time"])
                for state, reward, over, _, info in map(env.step, actions)]

    env, untouched = m.make_env(show_jump=True), m.make_env(show_jump=True)
    for game in (env, untouched):
        game.reset()
        walk(game, before)
    here, expected, found = slips.Saved(env), walk(untouched, way), []
    for actions in (way, other, way, other):
        found.append(walk(env, actions))
        here.restore()
    assert found[0] == found[2] == expected and len({x for *_, x, _ in expected}) > 5  # Mario runs
    assert found[1] == found[3] != expected[:5]
    env.close()
    untouched.close()


def test_the_buffer_beneath_the_screen_is_found_without_a_copy():
    env = m.make_game("1-1")
    env.reset()
    obs, *_ = env.step(RIGHT)
    buffer = m.bgrx(obs)
    assert np.shares_memory(buffer, obs) and buffer.flags.c_contiguous and buffer.shape == (240, 256, 4)
    np.testing.assert_array_equal(buffer[:, :, 2::-1], obs)
    plain = np.array(obs)  # a picture of one's own has no such buffer: it is copied
    assert not np.shares_memory(m.bgrx(plain), plain)
    np.testing.assert_array_equal(m.bgrx(plain)[:, :, 2::-1], obs)
    env.close()


@pytest.mark.skipif(sys.version_info < (3, 13), reason="nes-py 8 has no grey of its own")
def test_the_emulators_own_grey_is_the_tutorials_only_before_the_maximum_of_two_frames():
    env, rng = m.make_game("1-1"), np.random.default_rng(0)
    env.reset()
    colours, greys, furthest = [], [], 0
    for k in range(240):
        obs, _, terminated, _, _ = env.step(int(rng.choice([RIGHT, RIGHT + A])) if k % 20 == 0 else RIGHT)
        colours.append(np.array(obs))
        greys.append(env.unwrapped.observation("grayscale").astype(int))
        tutorial = np.round(colours[-1] @ np.array([0.299, 0.587, 0.114]))
        assert np.abs(greys[-1] - tutorial).max() <= 1  # one frame: equal within rounding
        if k:
            brightest = np.round(np.maximum(*colours[-2:]) @ np.array([0.299, 0.587, 0.114]))
            furthest = max(furthest, np.abs(np.maximum(*greys[-2:]) - brightest).max())
        if terminated:
            env.reset()
    env.close()
    assert furthest > 10  # and that is why it is not used: MaxAndSkipEnv takes the maximum in colour


def wanted(python):
    """{name: specifiers} that requirements.txt asks for on this Python, such as 3.12."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {one.name: one.specifier for one in found
            if not one.marker or one.marker.evaluate({"python_version": python})}


def test_the_requirements_name_one_generation_for_every_python_and_stop_on_the_others():
    both = {"torch", "matplotlib", "tqdm", "gym-super-mario-bros", "nes-py", "numpy", "opencv-python"}
    for python in ("3.10", "3.11", "3.12"):
        assert wanted(python).keys() == both | {"gym", "setuptools"}
        assert "7.4.0" in wanted(python)["gym-super-mario-bros"]
    for python in ("3.13", "3.14"):
        assert wanted(python).keys() == both | {"gymnasium"}
        assert "9.1.0" in wanted(python)["gym-super-mario-bros"]
    for python in ("3.8", "3.9", "3.15"):
        assert "needs-python" in wanted(python)


def test_the_packages_are_those_of_the_requirements():
    for name, specifier in wanted(f"3.{sys.version_info.minor}").items():
        assert version(name) in specifier, f"{name} {version(name)} is not {specifier}: pip install -r requirements.txt"


@pytest.mark.parametrize("program", ["mario_ddqn.py", "grid_qlearning.py"])
@pytest.mark.parametrize("version", [(3, 9, 18), (3, 15, 0)])
def test_another_python_gets_one_clear_line_and_exit_code_2(program, version):
    pretend = (f"import sys, runpy; sys.version_info, sys.version = {version}, '{'.'.join(map(str, version))} (x)'; "
               f"runpy.run_path({str(ROOT / program)!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", pretend], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"{program}: this is Python {'.'.join(map(str, version))}; it needs Python 3.10 to 3.14\n"


if __name__ == "__main__":
    record()
