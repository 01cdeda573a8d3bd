"""Deep Q-learning plays Super Mario Bros (NES) World 1-1 from pixels.

    python mario_ddqn.py --double            train (the settings' flags: --help)
    python mario_ddqn.py --evaluate RUN      how often does it clear the level?
    python mario_ddqn.py --watch RUN         look at it play

Read it from top to bottom: environment, network, agent with its replay memory, training loop,
evaluation and pictures, command line. The letters in the shapes: B = batch, E = emulators.
"""
import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import warnings
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from textwrap import fill

try:
    import fcntl
except ImportError:  # Windows: there a run is not locked
    fcntl = None

if not (3, 10) <= sys.version_info < (3, 15):
    print(f"mario_ddqn.py: this is Python {sys.version.split()[0]}; it needs Python 3.10 to 3.14", file=sys.stderr)
    raise SystemExit(2)

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # PyTorch's idle threads sleep: the emulators need their cores

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image  # comes with matplotlib
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

# The game's packages come in two generations: gym and gym-super-mario-bros 7 up to Python 3.12, Gymnasium and
# gym-super-mario-bros 9 from 3.13 on (requirements.txt). They differ here and in `make_game`, nowhere else.
if sys.version_info < (3, 13):
    with contextlib.redirect_stderr(io.StringIO()):  # gym 0.26 greets with a notice that it is retired
        import gym
    gym.logger.set_level(gym.logger.ERROR)  # the "-v0 is out of date" hint: v0 is the original game, on purpose
else:
    import gymnasium as gym
import gym_super_mario_bros  # noqa: F401 - registers the game
from gym_super_mario_bros.actions import RIGHT_ONLY
from nes_py.wrappers import JoypadSpace

cv2.setNumThreads(1)  # one frame is too small to share out; the threads belong to the emulators


class UserError(Exception):
    """Something the user can mend. Its text is the one line they get to read; exit code 2."""


# ===== 1. Environment. In: a stage and an action (0 to 4). Out: a state (4, 84, 84) float32 in [0, 1], a reward.

def bgrx(obs):
    """The emulator's own picture, (240, 256, 4) uint8 in the order B, G, R, unused, beneath `obs`.

    nes-py hands out a mirrored view of this buffer, (240, 256, 3) in RGB. Every copy of such a view
    goes byte by byte; the buffer beneath it is copied at once. Same pixels, four times as fast.
    """
    if obs.strides == (1024, 4, -1):  # such a view: four bytes a pixel, read backwards
        return np.lib.stride_tricks.as_strided(obs[:, :, ::-1], (240, 256, 4), (1024, 4, 1))
    return cv2.cvtColor(np.ascontiguousarray(obs), cv2.COLOR_RGB2BGRA)


class MaxAndSkipEnv(gym.Wrapper):
    """Repeats an action for `skip` frames, adds up the rewards, and shows the pixel-wise maximum of the
    last two frames, because the NES draws some sprites on every other frame only (Mnih et al. 2015,
    Methods, "Preprocessing")."""

    def __init__(self, env, skip=4):
        super().__init__(env)
        self.skip = skip
        self.frames = deque(maxlen=2)

    def step(self, action):
        total_reward = 0.0
        for _ in range(self.skip):
            obs, reward, terminated, truncated, info = self.env.step(action)
            self.frames.append(bgrx(obs).copy())  # a copy: the emulator draws the next frame into the same place
            total_reward += reward
            if terminated or truncated:
                break
        brightest = np.maximum(*self.frames)  # (240, 256, 4) uint8
        return brightest[:, :, 2::-1], total_reward, terminated, truncated, info  # (240, 256, 3) uint8, RGB

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.frames.clear()
        self.frames.append(bgrx(obs).copy())
        return self.frames[0][:, :, 2::-1], info


class ProcessFrame84(gym.ObservationWrapper):
    """Grey (0.299 R + 0.587 G + 0.114 B), 84 wide × 110 high, and of that rows 18 to 101: no score line.

    With `show_jump` a white line above the picture says that button A is down. Mario jumps only when it
    goes down anew, and no picture shows where it is: an agent that cannot see its own thumb stands in front
    of a step for ever, pressing A."""

    def __init__(self, env, show_jump=False):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (84, 84, 1), np.uint8)
        self.show_jump, self.buttons = show_jump, 0

    def reset(self, **kwargs):
        self.buttons = 0
        return super().reset(**kwargs)

    def step(self, action):
        self.buttons = action  # one bit per button, as JoypadSpace has translated it; A is the lowest
        return super().step(action)

    def observation(self, obs):
        grey = cv2.cvtColor(bgrx(obs), cv2.COLOR_BGRA2GRAY)                 # (240, 256) uint8
        small = cv2.resize(grey, (84, 110), interpolation=cv2.INTER_AREA)   # (110, 84) uint8
        small = small[18:102]                                               # (84, 84) uint8
        if self.show_jump and self.buttons & 1:
            small[:4] = 255
        return small[:, :, None]                                            # (84, 84, 1) uint8


class ImageToPyTorch(gym.ObservationWrapper):
    """Channel first, as PyTorch's convolutions want it."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (1, 84, 84), np.uint8)

    def observation(self, obs):
        return np.moveaxis(obs, 2, 0)  # (1, 84, 84) uint8


class BufferWrapper(gym.ObservationWrapper):
    """The last `n_steps` frames as one observation: one still picture does not show which way Mario
    flies. Before the first frame of an episode there is black."""

    def __init__(self, env, n_steps=4):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (n_steps, 84, 84), np.uint8)

    def reset(self, **kwargs):
        self.buffer = np.zeros(self.observation_space.shape, np.uint8)
        return super().reset(**kwargs)

    def observation(self, obs):
        self.buffer = np.concatenate([self.buffer[1:], obs])  # (4, 84, 84) uint8, oldest first
        return self.buffer


class ScaledFloatFrame(gym.ObservationWrapper):
    """÷ 255: networks learn best from inputs between 0 and 1."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0.0, 1.0, env.observation_space.shape, np.float32)

    def observation(self, obs):
        return obs.astype(np.float32) / 255.0  # (4, 84, 84) float32


class TutorialReward(gym.Wrapper):
    """What gym-super-mario-bros 7 pays for a frame, for version 9, which pays otherwise (for a new furthest x only,
    for score, coins and the flag): Δx + Δclock − 25 for dying, clipped to ±15."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.x, self.clock = info["x_pos"], info["time"]
        return obs, info

    def step(self, action):
        obs, _, terminated, truncated, info = self.env.step(action)
        moved, ticked = info["x_pos"] - self.x, info["time"] - self.clock
        self.x, self.clock = info["x_pos"], info["time"]
        reward = (moved if abs(moved) <= 5 else 0) + min(ticked, 0)  # Mario is no faster; the clock runs backwards
        reward -= 25 * (info["is_dying"] or info["is_dead"])
        return obs, float(np.clip(reward, -15, 15)), terminated, truncated, info


def make_game(stage):
    """The bare game, (240, 256, 3) uint8, and its reward, the same in both generations of packages."""
    if sys.version_info < (3, 13):  # gym 0.26: nes-py 8 still speaks the API before it
        return gym.make(f"SuperMarioBros-{stage}-v0", apply_api_compatibility=True, disable_env_checker=True)
    return TutorialReward(gym.make(f"SuperMarioBros-{stage}-v0", disable_env_checker=True))


def make_env(stage="1-1", show_jump=False):
    """The game as the agent sees it: states (4, 84, 84) float32 in [0, 1], five actions (RIGHT_ONLY).

    The reward of a frame is Δx + Δclock − 25 for dying, clipped to ±15; a step adds up four frames.
    """
    env = MaxAndSkipEnv(make_game(stage))
    env = ProcessFrame84(env, show_jump)
    env = ImageToPyTorch(env)
    env = BufferWrapper(env)
    env = ScaledFloatFrame(env)
    return JoypadSpace(env, RIGHT_ONLY)


class Emulators:
    """`count` games side by side, stepped by a pool of threads. The emulator is C++ that runs outside
    Python's global lock, so threads are enough, and each game's result is the same however they are
    scheduled. `history[e]` are the actions of game e since its reset: with them it can be rebuilt."""

    def __init__(self, count, stage="1-1", show_jump=False):
        self.envs = [make_env(stage, show_jump) for _ in range(count)]
        self.history = [[] for _ in range(count)]
        self.pool = ThreadPoolExecutor(min(count, os.cpu_count() or 1)) if count > 1 else None

    def start(self, history):
        """Every game anew, and then the actions of `history` (a list for each game, empty for a fresh start).
        nes-py cannot save a game, but the game is deterministic. Returns states (E, 4, 84, 84) float32."""
        def replay(e):
            state = self.reset(e)
            for action in history[e]:
                state = self._step(e, action)[0]
            return state
        return np.stack(list((self.pool.map if self.pool else map)(replay, range(len(self.envs)))))

    def reset(self, e):
        self.history[e] = []
        return self.envs[e].reset()[0]  # (4, 84, 84) float32

    def step(self, actions, which=None):
        """One agent step in each game of `which` (all by default). Returns a list of
        (next_state, reward, terminated, truncated, info) in the same order."""
        which = range(len(self.envs)) if which is None else which
        return list((self.pool.map if self.pool else map)(self._step, which, actions))

    def _step(self, e, action):
        self.history[e].append(int(action))
        try:
            return self.envs[e].step(int(action))
        except Exception as error:
            raise UserError(f"game {e} broke down in step {len(self.history[e])}: {error!r}") from error

    def close(self):
        if self.pool:
            self.pool.shutdown()
        for env in self.envs:
            env.close()


# The game starts in the same state every time and has no randomness: without noise a greedy agent plays
# one trajectory, again and again. Up to `noop` idle steps at the start, a random action with probability
# `epsilon`, and the last action once more with probability `sticky` (Machado et al. 2018, section 5).
NOISES = {"none": {}, "noop": {"noop": 30}, "epsilon": {"epsilon": 0.05}, "sticky": {"sticky": 0.25}}


class Episode:
    """One episode in one emulator: its noise ("noop", or several: "noop,epsilon"), and what it has come to so far."""

    def __init__(self, rng, noise="none"):
        self.rng, self.noise = rng, {"noop": 0, "epsilon": 0.0, "sticky": 0.0}
        for name in noise.split(","):
            self.noise.update(NOISES[name])
        self.idle = int(rng.integers(self.noise["noop"] + 1))
        self.last_action, self.known = 0, 0
        self.total_reward, self.length, self.furthest_x, self.cleared = 0.0, 0, 0, False

    def disturb(self, action):
        """The action that was chosen goes in, the action that reaches the game comes out. `known` is what an agent
        may remember of it: that it has to wait, but not that its thumb slipped. To whoever does not see the slips, they
        are a property of the world, and an edge is a dangerous place."""
        self.known = int(action)
        if self.idle > 0:
            self.idle, self.known, action = self.idle - 1, 0, 0
        elif self.noise["epsilon"] and self.rng.random() < self.noise["epsilon"]:
            action = self.rng.integers(len(RIGHT_ONLY))
        elif self.noise["sticky"] and self.rng.random() < self.noise["sticky"]:
            action = self.last_action
        self.last_action = int(action)
        return self.last_action

    def add(self, reward, info):
        self.total_reward += reward
        self.length += 1
        self.furthest_x = max(self.furthest_x, int(info["x_pos"]))
        self.cleared |= bool(info["flag_get"])


# ===== 2. Network. In: states (B, 4, 84, 84) float32. Out: one Q-value for each action, (B, 5) float32.

class DQNSolver(nn.Module):
    """Three convolutions, two linear layers (Mnih et al. 2015, Methods, "Model architecture")."""

    def __init__(self, input_shape, n_actions):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(input_shape[0], 32, kernel_size=8, stride=4), nn.ReLU(),  # (B, 32, 20, 20)
            nn.Conv2d(32, 64, kernel_size=4, stride=2), nn.ReLU(),              # (B, 64, 9, 9)
            nn.Conv2d(64, 64, kernel_size=3, stride=1), nn.ReLU(),              # (B, 64, 7, 7)
            nn.Flatten(),                                                       # (B, 3136)
        )
        n_features = self.conv(torch.zeros(1, *input_shape)).shape[1]
        self.fc = nn.Sequential(nn.Linear(n_features, 512), nn.ReLU(), nn.Linear(512, n_actions))

    def forward(self, x):
        return self.fc(self.conv(x))  # (B, n_actions)


# ===== 3. Agent. In: transitions (state, action, reward, next_state, terminal). Out: actions.

class ReplayMemory:
    """The last `capacity` frames of play, first in, first out, each stored once as 84×84 uint8.

    A state is four frames and shares three of them with the next one, so two float stacks per transition
    (225,800 bytes) hold mostly copies. Here every emulator writes a ring of single frames, 7,067 bytes a
    step, and `sample` puts the stacks together again, just as BufferWrapper made them. Counters never wrap;
    counter % size is the place in the ring. An episode of T steps takes T + 1 places: its last frame is
    kept as well. n-step sums are made on sampling and never cross an episode's end.
    """

    SMALL = ("actions", "rewards", "age", "end", "priority", "head", "fresh")

    def __init__(self, capacity, n_envs=1, stack=4, frame_shape=(84, 84)):
        self.size = math.ceil(capacity / n_envs)  # places per emulator
        self.stack = stack
        # np.empty: the system hands out the memory page by page as it fills.
        self.frames = np.empty((n_envs, self.size, *frame_shape), np.uint8)
        self.actions = np.zeros((n_envs, self.size), np.uint8)
        self.rewards = np.zeros((n_envs, self.size), np.float32)
        self.age = np.zeros((n_envs, self.size), np.uint8)  # frames before this one in its episode, up to stack - 1
        self.end = np.zeros((n_envs, self.size), np.uint8)  # 0: goes on, 1: terminated here, 2: truncated here
        self.priority = np.zeros((n_envs, self.size), np.float32)  # 0: an episode's last frame, no action taken
        self.head = np.zeros(n_envs, np.int64)              # frames ever written, per emulator
        self.fresh = np.ones(n_envs, bool)                  # the next transition starts an episode

    @property
    def nbytes(self):
        return sum(a.nbytes for a in (self.frames, self.actions, self.rewards, self.age, self.end, self.priority))

    def __len__(self):
        return int(np.minimum(self.head, self.size).sum())

    def _push_frame(self, state, env, age):
        at = self.head[env] % self.size
        self.frames[env, at] = np.rint(state[-1] * 255)  # the float state's newest frame, back to whole numbers
        self.age[env, at] = min(age, self.stack - 1)
        self.end[env, at] = self.priority[env, at] = 0
        self.head[env] += 1

    def push(self, state, action, reward, next_state, terminal, truncated=False, env=0):
        """state, next_state: (4, 84, 84) float32 of emulator `env`, whose transitions come in order."""
        if self.fresh[env]:
            self._push_frame(state, env, age=0)
        at = (self.head[env] - 1) % self.size
        self.actions[env, at], self.rewards[env, at] = action, reward
        self.priority[env, at] = max(1.0, self.priority.max())  # new: to be seen soon
        self.end[env, at] = 1 if terminal else 2 if truncated else 0
        self._push_frame(next_state, env, age=int(self.age[env, at]) + 1)
        self.fresh[env] = bool(terminal or truncated)

    def _stacks(self, env, counter):
        back = np.arange(1 - self.stack, 1)                                    # (4,): -3, -2, -1, 0
        stacks = self.frames[env[:, None], (counter[:, None] + back) % self.size]  # (B, 4, 84, 84) uint8
        stacks[-back > self.age[env, counter % self.size][:, None]] = 0        # black before the episode began
        return stacks

    def _whole(self, env, counter, n_step):
        """Which places begin a whole transition: four frames up to it, n steps or the episode's end after it."""
        oldest, newest = np.maximum(self.head[env] - self.size, 0), self.head[env] - 1
        ahead = np.minimum(counter[:, None] + np.arange(n_step), newest[:, None])  # (B, n)
        ends = self.end[env[:, None], ahead % self.size] > 0
        begins = counter - self.age[env, counter % self.size] >= oldest
        return begins & ((counter + n_step <= newest) | ends.any(1)) & (self.priority[env, counter % self.size] > 0)

    def sample(self, batch, rng, n_step=1, gamma=1.0):
        """`batch` transitions, each drawn in proportion to its priority (all equal: uniformly). Returns states
        (B, 4, 84, 84) uint8, actions (B,) int64, rewards (B,) float32 summed over up to n steps, next_states
        (B, 4, 84, 84) uint8, terminals (B,) float32 and discounts (B,) float32, the power of γ that belongs to
        next_states. `drawn` keeps the places they came from."""
        cumulative = np.cumsum(self.priority, dtype=np.float64)               # (E · size,)
        env, counter = np.empty(0, np.int64), np.empty(0, np.int64)
        for _ in range(1000):  # draw, keep what is whole (nearly all), draw again for the rest
            place = np.searchsorted(cumulative, rng.random(batch - len(env)) * cumulative[-1], side="right")
            e, at = np.divmod(np.minimum(place, len(cumulative) - 1), self.size)
            newest = self.head[e] - 1
            c = newest - (newest - at) % self.size                            # place in the ring -> counter
            keep = self._whole(e, c, n_step)
            env, counter = np.append(env, e[keep]), np.append(counter, c[keep])
            if len(env) == batch:
                self.drawn = env, counter % self.size
                return self.gather(env, counter, n_step, gamma)
        raise RuntimeError("the replay memory holds no whole transition: it is too small")

    def gather(self, env, counter, n_step=1, gamma=1.0):
        """The transitions that start at these places (see `sample`)."""
        ahead = (counter[:, None] + np.arange(n_step)) % self.size            # (B, n)
        ends = self.end[env[:, None], ahead]                                  # (B, n)
        alive = np.cumsum(ends > 0, axis=1) - (ends > 0) == 0                 # (B, n) steps up to and with the end
        powers = gamma ** np.arange(n_step)                                   # (n,)
        # R = r_t + γ r_{t+1} + … + γ^{m-1} r_{t+m-1},  m = n, or fewer when the episode ends before
        rewards = (self.rewards[env[:, None], ahead] * powers * alive).sum(1)
        steps = alive.sum(1)                                                  # (B,) m
        terminals = ((ends == 1) & alive).any(1)
        return (self._stacks(env, counter), self.actions[env, counter % self.size].astype(np.int64),
                rewards.astype(np.float32), self._stacks(env, counter + steps),
                terminals.astype(np.float32), (gamma ** steps).astype(np.float32))

    def state_dict(self):
        """Everything in it, for a checkpoint; frames squeezed by zlib to about a tenth."""
        def squeeze(env):
            return torch.frombuffer(bytearray(zlib.compress(self.frames[env, :self.head[env]], 1)), dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            frames = list(pool.map(squeeze, range(len(self.frames))))
        return {"frames": frames, **{name: torch.from_numpy(getattr(self, name)) for name in self.SMALL}}

    def load_state_dict(self, saved):
        for name in self.SMALL:
            getattr(self, name)[:] = saved[name].numpy()
        for env, squeezed in enumerate(saved["frames"]):
            frames = np.frombuffer(zlib.decompress(squeezed.numpy()), np.uint8)
            self.frames[env, :self.head[env]] = frames.reshape(-1, *self.frames.shape[2:])


RULES = ("single", "tutorial", "hasselt")


class DQNAgent:
    """Deep Q-learning (Mnih et al. 2015). The local network acts and learns; the target network, a copy of it
    that is refreshed every `copy` updates, values the next state. `rule` is how (see `td_target`)."""

    PARTS = ("local_net", "target_net", "average_net", "optimiser", "memory")

    def __init__(self, input_shape, n_actions, rule="tutorial", gamma=0.9, lr=2.5e-4, batch=32,
                 memory=30_000, copy=5_000, eps_start=1.0, eps_decay=0.99, eps_min=0.02, n_step=1, hold=0,
                 reward_scale=1.0, priority=0.0, learn_start=32, lr_late=(5e-5,), lr_switch=(0,), average=0,
                 n_envs=1, seed=0, device="cpu", bf16=False):
        self.rule, self.gamma, self.batch, self.copy, self.n_step = rule, gamma, batch, copy, n_step
        self.eps_start, self.eps_decay, self.eps_min = eps_start, eps_decay, eps_min
        self.hold, self.reward_scale, self.priority = hold, reward_scale, priority
        self.learn_start, self.lr_late = max(learn_start, batch), dict(zip(lr_switch, lr_late, strict=True))
        self.n_actions, self.device = n_actions, torch.device(device)
        with torch.random.fork_rng(devices=[]):  # the seed decides the first weights, and nothing else
            torch.manual_seed(seed)
            self.local_net = DQNSolver(input_shape, n_actions).to(self.device, memory_format=torch.channels_last)
        # local_net acts and learns; target_net, a copy refreshed now and then, values the next state.
        self.target_net = self.local_net if rule == "single" else deepcopy(self.local_net)
        # For exams, meant to be steadier than each: the mean of about the last 1,000 updates' networks; or of all so
        # far, the n-th with weight n^average: mostly of the run's last 1/average (Shamir and Zhang 2013, section 4).
        self.average_net = AveragedModel(self.local_net, avg_fn=lambda mean, new, n: mean + (new - mean) * (
            (average + 1) / (n + average + 1) if average else 0.01))
        self.optimiser = torch.optim.Adam(self.local_net.parameters(), lr=lr, fused=True)
        self.memory = ReplayMemory(memory, n_envs, input_shape[0], input_shape[1:])
        self.rng_act, self.rng_replay = (np.random.default_rng([seed, k]) for k in (1, 2))
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=bf16)
        self.updates = 0
        self.held = np.zeros((2, n_envs), np.int64)  # the held action, and for how many more steps

    @property
    def epsilon(self):
        """ε after so many updates: eps_start · eps_decay^updates, but never below eps_min."""
        return max(self.eps_min, self.eps_start * self.eps_decay ** self.updates)

    @torch.no_grad()
    def q_values(self, states, net=None):
        """states (B, 4, 84, 84) float32 in [0, 1] -> (B, n_actions) float32; net: local unless given."""
        return (net or self.local_net)(torch.from_numpy(states).to(self.device)).cpu().numpy()

    def act(self, states):
        """ε-greedy on the local network: states (E, 4, 84, 84) float32 -> actions (E,) int64.

        With `hold` > 0 a random action is kept for k steps, k from a zeta distribution (P(k) ~ 1/k², at
        most `hold`; Dabney et al. 2020, section 4): high pipes need the jump button held, which a new random
        action each step almost never does."""
        n = len(states)
        begin = (self.held[1, :n] == 0) & (self.rng_act.random(n) < self.epsilon)
        self.held[0, :n][begin] = self.rng_act.integers(self.n_actions, size=n)[begin]
        self.held[1, :n][begin] = np.minimum(self.rng_act.zipf(2.0, n), self.hold)[begin] if self.hold else 1
        explore = self.held[1, :n] > 0
        self.held[1, :n] -= explore
        actions = self.held[0, :n].copy()
        if not explore.all():
            actions[~explore] = self.q_values(states[~explore]).argmax(1)
        return actions

    def remember(self, state, action, reward, next_state, terminal, truncated=False, env=0):
        """One transition of emulator `env` into the replay memory."""
        self.memory.push(state, action, reward * self.reward_scale, next_state, terminal, truncated, env)
        if terminal or truncated:
            self.held[1, env] = 0

    def recall(self):
        """A batch: states, actions, rewards, next_states, terminals, discounts (`priority` 0: uniform)."""
        sample = self.memory.sample(self.batch, self.rng_replay, self.n_step, self.gamma)
        sample = [torch.from_numpy(x).to(self.device) for x in sample]
        state, action, reward, next_state, terminal, discount = sample
        state, next_state = (x.contiguous(memory_format=torch.channels_last).float().div_(255)
                             for x in (state, next_state))  # (B, 4, 84, 84) float32
        return state, action, reward, next_state, terminal, discount

    def td_target(self, reward, next_state, terminal, discount):
        """What Q(s, a) should have been, (B,) float32. The three rules differ in one line each."""
        if self.rule == "single":
            # r + γ max_a Q_local(s', a)                   (one network on both sides; Mnih et al. 2013)
            next_value = self.local_net(next_state).max(1).values  # (B,)
        elif self.rule == "tutorial":
            # r + γ max_a Q_target(s', a)                  (Mnih et al. 2015, eq. 2)
            next_value = self.target_net(next_state).max(1).values  # (B,)  <- changed: older copy
        else:  # hasselt
            # r + γ Q_target(s', argmax_a Q_local(s', a))  (van Hasselt, Guez and Silver 2016, eq. 4)
            best = self.local_net(next_state).argmax(1, keepdim=True)  # (B, 1)  <- changed: local picks
            next_value = self.target_net(next_state).gather(1, best).squeeze(1)  # (B,)  <- target values
        return reward + discount * next_value.float() * (1 - terminal)  # a terminal step's target is r

    def experience_replay(self):
        """One update, when there is enough to learn from. Returns (loss, mean Q) as tensors, or None."""
        if len(self.memory) < self.learn_start + (self.n_step + 1) * len(self.memory.head):
            return None
        if self.rule != "single" and self.updates % self.copy == 0:
            self.copy_model()
        if self.updates and self.updates in self.lr_late:  # late, smaller steps: the policy comes to rest
            self.optimiser.param_groups[0]["lr"] = self.lr_late[self.updates]
        state, action, reward, next_state, terminal, discount = self.recall()
        with torch.no_grad(), self.autocast():  # no gradient through the target, in any rule
            td_target = self.td_target(reward, next_state, terminal, discount)        # (B,)
        with self.autocast():
            q_values = self.local_net(state).gather(1, action[:, None]).squeeze(1)    # (B,) Q(s, a)
        # L = mean w · Huber(Q(s, a) − target),  w ~ priority^-0.4: what is drawn more often weighs less
        weight = torch.from_numpy(self.memory.priority[self.memory.drawn] ** -0.4).to(self.device)
        huber = functional.smooth_l1_loss(q_values.float(), td_target, reduction="none")  # (B,)
        loss = (weight / weight.max() * huber).mean()
        if not torch.isfinite(loss):  # before it can spoil the weights
            raise UserError(f"the loss of update {self.updates} is {loss:.0f}: try a smaller --lr or --reward-scale")
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        if self.priority:  # p = |δ|^priority: more of what surprised (Schaul et al. 2016, 3.3 and 3.4)
            surprise = (q_values.detach().float() - td_target).abs().cpu().numpy()
            self.memory.priority[self.memory.drawn] = (surprise + 0.01) ** self.priority
        if self.updates % 10 == 0:  # average <- 0.99 average + 0.01 local, or see __init__
            self.average_net.update_parameters(self.local_net)
        self.updates += 1
        return loss.detach(), q_values.detach().float().mean()

    def copy_model(self):
        """local network -> target network"""
        self.target_net.load_state_dict(self.local_net.state_dict())

    def state_dict(self):
        """All that its next action and update depend on, for a checkpoint."""
        generators = [rng.bit_generator.state for rng in (self.rng_act, self.rng_replay)]
        return {**{name: getattr(self, name).state_dict() for name in self.PARTS}, "updates": self.updates,
                "held": torch.from_numpy(self.held), "generators": json.dumps(generators)}

    def load_state_dict(self, saved):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(saved[name])
        self.updates, self.held = saved["updates"], saved["held"].numpy().copy()
        for rng, state in zip((self.rng_act, self.rng_replay), json.loads(saved["generators"]), strict=True):
            rng.bit_generator.state = state


# ===== 4. Training loop. In: the settings. Out: a folder with settings, one CSV row per episode, checkpoints, plot.

FORMAT = 1  # of last.pt and best.pt: one more with every change that older files do not fit
COLUMNS = {"episode": int, "env_steps": int, "seconds": float, "return": float, "length": int, "furthest_x": int,
           "cleared": int, "epsilon": float, "mean_q": float, "loss": float}


def write_atomically(path, write):
    """`write(file)` fills a temporary file beside `path`, which then takes its name: whole or not at all."""
    unfinished = path.with_name("partial-" + path.name)  # the ending stays: it tells some writers the format
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise UserError(f"{path} cannot be written, what was there before is untouched: "
                        f"{getattr(error, 'strerror', None) or error}".splitlines()[0]) from error


def write_json(path, content):
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def read_settings(folder):
    try:
        return {**json.loads((folder / "settings.json").read_text())}
    except (ValueError, TypeError):
        raise UserError(f"{folder / 'settings.json'}: damaged") from None


def read_rows(path):
    """The rows of an episodes.csv, numbers as numbers. A half-written last line (a crash) is left out."""
    rows = []
    with open(path, newline="", errors="replace") as file, contextlib.suppress(csv.Error):
        for row in csv.DictReader(file):
            with contextlib.suppress(TypeError, ValueError, KeyError):
                rows.append({name: kind(row[name]) for name, kind in COLUMNS.items()})
    return rows


def lock(folder):
    """One program per run. The system takes the lock back when the program ends, however it ends."""
    file = open(folder / "lock", "w")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another program is training this run") from None
    return file


@contextlib.contextmanager
def stop_signals():
    """Yields a list that Ctrl-C or SIGTERM puts its number into, so that the loop can finish its step and save.
    A second one stops at once."""
    asked, before = [], {}

    def handle(number, _):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    with contextlib.suppress(ValueError):  # outside the main thread nobody can send us a signal
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def choose_device(device, precision):
    """(device, bf16): the GPU where there is one; bfloat16 only on processors that calculate in it."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has_bf16 = device == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return device, precision == "bfloat16" or precision == "auto" and has_bf16


def make_agent(args):
    """A new agent for these settings, or a UserError when they cannot work. Says what its memory will take."""
    device, bf16 = choose_device(args.device, args.precision)
    enough = max(args.learn_start, args.batch) + (args.n_step + 1) * args.envs
    if args.memory < max(enough, 2 * (args.n_step + 2) * args.envs):
        raise UserError(f"--memory {args.memory} is too small for --learn-start {args.learn_start}, --batch "
                        f"{args.batch}, --n-step {args.n_step} and --envs {args.envs}: learning would never start")
    # Text with commas; a number or a list in the settings of older runs.
    switch, late = (re.findall(r"[^][, ]+", str(text)) for text in (args.lr_switch, args.lr_late))
    if len(switch) != len(late):
        raise UserError(f"--lr-late: one for each --lr-switch, please: {len(switch)}, not {len(late)}")
    available, frame = available_memory(), 84 * 84 + 11
    if available and args.memory * frame > 0.9 * available:
        raise UserError(f"--memory {args.memory} needs {args.memory * frame / 1e9:.1f} GB and {available / 1e9:.1f} GB "
                        f"are free; at most --memory {int(0.9 * available / frame)} fits")
    names = ("gamma", "lr", "batch", "memory", "copy", "eps_start", "eps_decay", "eps_min", "n_step", "hold",
             "reward_scale", "priority", "learn_start", "average", "seed")
    agent = DQNAgent((4, 84, 84), len(RIGHT_ONLY), rule=args.double, n_envs=args.envs, device=device, bf16=bf16,
                     lr_switch=[int(part) for part in switch], lr_late=[float(part) for part in late],
                     **{name: getattr(args, name) for name in names})
    print(f"replay memory: {args.memory} frames, {agent.memory.nbytes / 1e9:.2f} GB once it is full; learning on "
          f"{device}{' in bfloat16' if bf16 else ''} with {torch.get_num_threads()} threads")
    return agent


def available_memory():
    """Bytes this program may still take, or None where the system does not say."""
    with contextlib.suppress(OSError, TypeError):
        return int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    with contextlib.suppress(OSError, AttributeError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def run(args, folder, checkpoint=None):
    """Trains: makes the run in `folder`, or continues it from its checkpoint. Returns one dict per episode."""
    if args.threads:
        torch.set_num_threads(args.threads)
    agent, rng_noise = make_agent(args), np.random.default_rng([args.seed, 3])
    tracks = [Episode(rng_noise, args.train_noise) for _ in range(args.envs)]
    count, history = {"steps": 0, "credit": 0, "exams": 0, "seconds": 0.0}, [[]] * args.envs
    rows, exams, learnt = [], [], []  # learnt: (loss, mean Q) of each update since the last episode's end
    if checkpoint:
        try:
            agent.load_state_dict(checkpoint)
            count, history, exams = (checkpoint[name] for name in ("count", "history", "exams"))
            rows, rng_noise.bit_generator.state = (json.loads(checkpoint[name]) for name in ("rows", "noise"))
            learnt = [tuple(torch.tensor(x) for x in pair) for pair in checkpoint["learnt"]]
            for track, values in zip(tracks, checkpoint["tracks"], strict=True):
                vars(track).update(values)
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, zlib.error):
            raise UserError(f"{folder / 'last.pt'}: damaged, or not a checkpoint of a run") from None
    folder.mkdir(parents=True, exist_ok=True)
    locked, games = lock(folder), Emulators(args.envs, args.stage, args.show_jump == "yes")
    states = games.start(history)  # (E, 4, 84, 84) float32
    if not checkpoint:
        for old in (path for ending in ("*.pt", "*.json", "*.csv", "*.png") for path in folder.glob(ending)):
            old.unlink()
        write_json(folder / "settings.json", vars(args))
    text = io.StringIO(newline="")  # rows later than the checkpoint go: they will happen again
    csv.DictWriter(text, COLUMNS).writeheader()
    csv.DictWriter(text, COLUMNS).writerows(rows)
    write_atomically(folder / "episodes.csv", lambda file: file.write(text.getvalue().encode()))

    def save():
        content = {"format": FORMAT, "settings": json.dumps(vars(args)), "count": count, "exams": exams,
                   "rows": json.dumps(rows), "learnt": [(float(loss), float(q)) for loss, q in learnt],
                   "noise": json.dumps(rng_noise.bit_generator.state), "history": games.history,
                   "tracks": [{k: v for k, v in vars(track).items() if k not in ("rng", "noise")} for track in tracks],
                   **agent.state_dict()}
        write_atomically(folder / "last.pt", lambda file: torch.save(content, file))

    def add_row(track):
        loss, mean_q = torch.tensor(learnt).mean(0).tolist() if learnt else (math.nan, math.nan)
        rows.append(dict(zip(COLUMNS, (
            len(rows) + 1, count["steps"], round(count["seconds"], 2), track.total_reward, track.length,
            track.furthest_x, int(track.cleared), round(agent.epsilon, 5), round(mean_q, 4), round(loss, 5)),
            strict=True)))
        return rows[-1]

    def progress():
        speed = (count["steps"] - steps_before) / (count["seconds"] - seconds_before)
        returns, clears = zip(*((row["return"], row["cleared"]) for row in rows[-100:]), strict=True)
        return (f"{speed:.0f} steps/s, last {len(returns)}: return {np.mean(returns):.0f}, clears {sum(clears)}, "
                f"ε {agent.epsilon:.3f}")

    if not checkpoint:
        save()  # from now on the run can be continued, whatever happens
    started = saved = time.perf_counter()
    steps_before, seconds_before, enough = count["steps"], count["seconds"], False
    with stop_signals() as stop, open(folder / "episodes.csv", "a", newline="") as file, \
            tqdm(total=None if args.steps or args.minutes else args.episodes, initial=len(rows), unit="episode",
                 dynamic_ncols=True) as bar:
        while True:
            # 1. Now and then the agent is examined, and all is written down.
            if args.eval_every and count["steps"] // args.eval_every > count["exams"]:
                exam = examine(agent, args, count, rows, stop)
                if exam:  # else it was broken off, and is taken again when the run is continued
                    exams.append(exam)
                    count["exams"] = count["steps"] // args.eval_every
                    if exam["score"] >= max(exam["score"] for exam in exams):
                        save_network(folder / "best.pt", agent, args, exam)
                    write_json(folder / "exams.json", exams)
                    tqdm.write("{minutes:6.1f} min, {steps} steps: a greedy exam of {episodes} noisy episodes: "
                               "{cleared} cleared, mean furthest x {mean_furthest_x:.0f}".format(**exam))
                    enough = 0 < args.until_clear <= exam["cleared"] / exam["episodes"]
            if time.perf_counter() - saved > 60 * args.checkpoint_minutes:
                save()
                saved = time.perf_counter()
            if (stop or enough or len(rows) >= args.episodes or 0 < args.steps <= count["steps"]
                    or 0 < args.minutes * 60 <= count["seconds"]):
                break
            # 2. Every game takes one step; the agent remembers it.
            actions = [track.disturb(action) for track, action in zip(tracks, agent.act(states), strict=True)]
            for e, (next_state, reward, terminated, truncated, info) in enumerate(games.step(actions)):
                bonus = args.flag_bonus if info["flag_get"] else 0  # learnt from, not part of the returns
                agent.remember(states[e], tracks[e].known, reward + bonus, next_state, terminated, truncated, env=e)
                states[e] = next_state
                tracks[e].add(reward, info)
                count["steps"] += 1
                count["seconds"] = seconds_before + time.perf_counter() - started
                if terminated or truncated:
                    csv.DictWriter(file, COLUMNS).writerow(add_row(tracks[e]))
                    file.flush()
                    learnt, tracks[e], states[e] = [], Episode(rng_noise, args.train_noise), games.reset(e)
                    bar.set_postfix_str(progress(), refresh=False)
                    bar.update()
            # 3. The agent learns: one update for every `train_every` steps.
            count["credit"] += args.envs
            while count["credit"] >= args.train_every:
                count["credit"] -= args.train_every
                update = agent.experience_replay()
                learnt += [update] if update else []
        save()
    games.close()
    if not exams:
        save_network(folder / "best.pt", agent, args, None)
    plot_rewards([folder], folder / "rewards.png")
    name, more = shlex.quote(str(folder)), ""
    if not stop:  # a limit was reached: going on needs new ones
        more += f" --episodes {max(args.episodes, len(rows)) + 1000}"
        more += f" --steps {count['steps'] + 100_000}" if args.steps else ""
        more += f" --minutes {count['seconds'] / 60 + 60:.0f}" if args.minutes else ""
    print(f"{'stopped' if stop else 'finished'} after {len(rows)} episodes, {count['steps']} steps and "
          f"{count['seconds'] / 60:.1f} minutes; {sum(row['cleared'] for row in rows)} clears"
          f"{f' (--until-clear {args.until_clear} is reached)' if enough else ''}\n"
          f"continue:    python mario_ddqn.py --resume {name}{more}\n"
          f"clear rate:  python mario_ddqn.py --evaluate {name} --noise noop\n"
          f"watch it:    python mario_ddqn.py --watch {name}")
    locked.close()
    if stop:
        raise KeyboardInterrupt(stop[0])  # all is saved; the exit code says what stopped it
    return rows


# ===== 5. Evaluation and pictures. In: a trained network, or runs. Out: clear rates, clips, reward curves.

def promise(chosen, gamma, cut):
    """What the network promised and what came, in points: the mean Q(s, a) of the greedy actions an episode played,
    and the mean discounted return that followed them (van Hasselt, Guez and Silver 2016, figure 3).

    chosen: (Q(s, a), or None where noise chose the action; reward) of every step. cut: the episode was broken off,
    so that the last 100 returns are not whole."""
    kept, total = [], 0.0
    for after, (value, reward) in enumerate(reversed(chosen)):
        total = reward + gamma * total  # G_t = r_t + γ G_{t+1}
        if value is not None and (after >= 100 or not cut):
            kept.append((value, total))
    q, came = (float(np.mean(column)) for column in zip(*kept, strict=True)) if kept else (None, None)
    return {"q": q, "discounted_return": came}


def play(q_values, episodes, noise, seed, settings=(), watch=None, stop=(), max_steps=1000):
    """Greedy episodes, up to 8 at a time. Episode i draws its noise from a generator of its own,
    whichever emulator plays it. After `max_steps` agent steps (a clear takes about 300) it ends as not
    cleared. `watch(env, track, info, done)` is called after every step. `settings`: those the network was trained
    with (a dict; stage, show_jump, gamma and reward_scale count here). Returns one dict per episode; fewer, when
    something turns up in `stop`."""
    trained = {"stage": "1-1", "show_jump": "no", "gamma": 0.95, "reward_scale": 1.0, **dict(settings)}
    games = Emulators(1 if watch else min(8, episodes), trained["stage"], trained["show_jump"] == "yes")
    waiting, results = list(range(episodes)), {}
    states, tracks = {}, {}
    while (waiting or tracks) and not stop:
        for e in set(range(len(games.envs))) - set(tracks):
            if waiting:
                tracks[e] = Episode(np.random.default_rng([seed, 4, waiting[0]]), noise)
                tracks[e].number, tracks[e].chosen, states[e] = waiting.pop(0), [], games.reset(e)
        which = sorted(tracks)
        values = q_values(np.stack([states[e] for e in which]))  # (E, 5)
        greedy = values.argmax(1)
        actions = [tracks[e].disturb(action) for e, action in zip(which, greedy, strict=True)]
        for k, (state, reward, terminated, truncated, info) in enumerate(games.step(actions, which)):
            e, track = which[k], tracks[which[k]]
            states[e] = state
            track.add(reward, info)
            own = actions[k] == greedy[k]
            track.chosen.append((float(values[k, greedy[k]]) / trained["reward_scale"] if own else None, reward))
            done = terminated or truncated or track.length >= max_steps
            if watch:
                watch(games.envs[e], track, info, done)
            if done:
                results[track.number] = {
                    "episode": track.number, "return": track.total_reward, "length": track.length,
                    "furthest_x": track.furthest_x, "end_x": int(info["x_pos"]),
                    "end": "cleared" if track.cleared else "died" if terminated else "out of time",
                    **promise(track.chosen, trained["gamma"], cut=not (terminated or truncated))}
                del tracks[e]
    games.close()
    return [results[number] for number in sorted(results)]


def means(results):
    """The two sides of `promise`, over the episodes that have them."""
    return {name: float(np.mean([result[name] for result in results if result[name] is not None] or [0]))
            for name in ("q", "discounted_return")}


def score(exam):
    """The share of clears in an exam plus the share in the last 100 games of the training, which cost nothing. Among
    equals the greater distance is better."""
    return exam["cleared"] / exam["episodes"] + exam["training_clears"] + exam["mean_furthest_x"] / 1e7


def examine(agent, args, count, rows, stop=()):
    """The run's own exam of its average network: half of the episodes with idle starts, half with random actions,
    greedy, in games of their own that are not learnt from, and 500 steps at most: who stands still has failed.
    Few games are a coarse judge, so the last 100 games of the training (`rows`) count as well (see `score`)."""
    half = math.ceil(args.eval_episodes / 2)
    q_values = partial(agent.q_values, net=agent.average_net)
    results = [result for noise in ("noop", "epsilon")
               for result in play(q_values, half, noise, args.seed + count["steps"], vars(args), stop=stop,
                                  max_steps=500)]
    if stop:  # broken off
        return None
    cleared = sum(result["end"] == "cleared" for result in results)
    distance = float(np.mean([result["furthest_x"] for result in results]))
    trained = float(np.mean([row["cleared"] for row in rows[-100:]] or [0]))
    exam = {"steps": count["steps"], "minutes": count["seconds"] / 60, "episodes": len(results), "cleared": cleared,
            "mean_furthest_x": distance, **means(results), "training_clears": trained}
    return {**exam, "score": score(exam)}


def wilson(successes, n, z=1.96):
    """95 % interval of a rate (Wilson 1927): unlike ± 1.96 standard errors it holds near 0 and 1, too."""
    rate, shrink = successes / n, 1 + z * z / n
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / shrink
    return max(0.0, (rate + z * z / (2 * n)) / shrink - half), min(1.0, (rate + z * z / (2 * n)) / shrink + half)


def save_network(path, agent, args, exam):
    """The average network alone, in half precision (3.4 MB), with its settings and the exam it passed."""
    weights = {name: weight.half().cpu().contiguous() for name, weight in agent.average_net.module.state_dict().items()}
    content = {"format": FORMAT, "settings": json.dumps(vars(args)), "local_net": weights, "exam": json.dumps(exam)}
    write_atomically(path, lambda file: torch.save(content, file))


def load_file(path):
    """A checkpoint or network file, read without running any code from it, and its settings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = {**torch.load(path, map_location="cpu", weights_only=True)}
        settings = {**json.loads(content["settings"])}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception:  # whatever a damaged file may raise, it comes to the same
        raise UserError(f"{path}: damaged, or not written by this program") from None
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: written by another version of this program")
    return content, settings


def find_network(name):
    """A run's folder or a file -> (path, function states -> Q-values, settings)."""
    path = Path(name)
    if path.is_dir():
        path = path / ("best.pt" if (path / "best.pt").exists() else "last.pt")
    content, settings = load_file(path)
    net = DQNSolver((4, 84, 84), len(RIGHT_ONLY))
    try:
        net.load_state_dict({name: weight.float() for name, weight in content["local_net"].items()})
    except (KeyError, RuntimeError):
        raise UserError(f"{path}: its network is not a DQNSolver for this game") from None
    return path, torch.no_grad()(lambda states: net(torch.from_numpy(states)).numpy()), settings


def evaluate(args):
    """--evaluate: plays, prints and saves the clear rate."""
    path, q_values, settings = find_network(args.evaluate)
    n = 1 if args.noise == "none" else args.episodes
    results = play(q_values, n, args.noise, args.seed, settings)
    ends = Counter((result["end"], result["end_x"] // 50 * 50) for result in results if result["end"] != "cleared")
    cleared, distance = n - sum(ends.values()), float(np.mean([result["furthest_x"] for result in results]))
    summary = {"network": path.name, "noise": args.noise, "seed": args.seed, "episodes": n, "cleared": cleared,
               "mean_return": float(np.mean([result["return"] for result in results])), "mean_furthest_x": distance,
               **means(results)}
    if args.noise == "none":  # one trajectory, always the same: not a rate
        print("{0}: {end} at x = {end_x}, return {return:.0f}, in the one greedy episode of a game without randomness. "
              "A rate needs noise: --noise noop, epsilon or sticky.".format(path, **results[0]))
    else:
        summary["clear_rate"], summary["wilson_95"] = cleared / n, wilson(cleared, n)
        low, high = summary["wilson_95"]
        print(f"{path}: cleared {cleared} of {n} episodes with --noise {args.noise}: {cleared / n:.0%} (95 % interval "
              f"{low:.0%} to {high:.0%}), mean furthest x {distance:.0f}")
        for (end, x), times in ends.most_common(8):
            print(f"{times:6d} × {end} at x = {x} to {x + 49}")
    print("Q of its actions: {q:.0f} points on average; the discounted return that followed: "
          "{discounted_return:.0f}".format(**summary))
    out = Path(args.out) if args.out else path.with_name(f"evaluation-{path.stem}-{args.noise}.json")
    write_json(out, {**summary, "results": results})
    print(f"saved {out}")


def show(args):
    """--watch and --record: greedy play in a window, or as a clip; 15 pictures a second, one per agent step."""
    path, q_values, settings = find_network(args.watch)
    if not args.record and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        raise UserError("--watch: there is no display here; add --record clip.gif to write a file instead")
    title, pictures = "Mario - q quits", []

    def watch(env, track, info, done):
        picture = np.zeros((264, 256, 3), np.uint8)
        picture[:240] = last_frames(env)[-1][:, :, :3]  # B, G, R; below the game's 240 rows stands the action
        text = " + ".join(RIGHT_ONLY[track.last_action]) + f"   x {info['x_pos']}" + "   CLEARED" * track.cleared
        cv2.putText(picture, text, (6, 257), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
        if args.record:
            pictures.extend([picture] * (30 if done else 1))  # a moment to see how it ended
            return
        cv2.imshow(title, cv2.resize(picture, None, fx=3, fy=3, interpolation=cv2.INTER_NEAREST))
        key = cv2.waitKey(1500 if done else 50)
        if key in (27, ord("q")) or cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) < 1:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):  # q, Esc, Ctrl-C or a closed window
        for result in play(q_values, args.episodes, args.noise, args.seed, settings, watch):
            print("{0}: {end} at x = {end_x}, return {return:.0f}, {length} steps".format(path, **result))
    if args.record:
        write_clip(Path(args.record), pictures)
        print(f"saved {args.record}: {len(pictures)} pictures")


def last_frames(env):
    """What MaxAndSkipEnv, somewhere in `env`, took the maximum of: one or two frames, (240, 256, 4) uint8 each."""
    while "frames" not in vars(env):
        env = env.env
    return env.frames


def write_clip(path, pictures, fps=15):
    """pictures: (264, 256, 3) uint8 each, in OpenCV's order B, G, R -> a GIF or MP4."""
    unfinished = path.with_name("partial-" + path.name)
    if path.suffix == ".gif":
        first, *others = (Image.fromarray(picture[:, :, ::-1].copy()).quantize(64) for picture in pictures)
        first.save(unfinished, save_all=True, append_images=others, duration=1000 // fps, loop=0)
    else:
        video = cv2.VideoWriter(str(unfinished), cv2.VideoWriter_fourcc(*"mp4v"), fps, pictures[0].shape[1::-1])
        for picture in pictures:
            video.write(picture)
        video.release()
    os.replace(unfinished, path)


def plot_rewards(folders, out, x="episodes", window=100):
    """Reward curves of several runs on one picture: raw faint, rolling mean strong, clears marked."""
    settings = [read_settings(folder) for folder in folders]
    differing = [name for name in settings[0] if len({str(s.get(name)) for s in settings}) > 1 and name not in LIMITS]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for k, folder in enumerate(folders):
        rows = read_rows(folder / "episodes.csv")
        returns, cleared = (np.array([row[name] for row in rows]) for name in ("return", "cleared"))
        across = {"episodes": "episode", "steps": "env_steps", "minutes": "seconds"}[x]
        position = np.array([row[across] for row in rows]) / (60 if x == "minutes" else 1)
        rolling = [returns[max(0, i - window):i].mean() for i in range(1, len(rows) + 1)]
        label = fill(", ".join(f"{name} {settings[k].get(name)}" for name in differing) or folder.name, 50)
        axes.plot(position, returns, color=f"C{k}", alpha=0.3, linewidth=0.7)
        axes.plot(position, rolling, color=f"C{k}", linewidth=2, label=f"{label} ({cleared.sum():.0f} clears)")
        axes.plot(position[cleared > 0], returns[cleared > 0], "*", color=f"C{k}", markersize=7,
                  markeredgecolor="black", markeredgewidth=0.4)
    axes.set_xlabel({"episodes": "episode", "steps": "environment steps", "minutes": "minutes"}[x])
    axes.set_ylabel(f"total reward of an episode\n(strong line: mean of the last {window}; star: cleared)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    write_atomically(out, lambda file: figure.savefig(file, format=out.suffix[1:], dpi=110))


# ===== 6. Command line. In: what was typed. Out: exit code 0, or one line on what is wrong and exit code 2.

DEFAULTS = {}  # filled by build_parser: every setting of a run
PRESETS = {
    "default": {},
    "tutorial": {  # the tutorial's settings, to the letter
        "envs": 1, "gamma": 0.90, "lr": 2.5e-4, "batch": 32, "memory": 30_000, "train_every": 1, "copy": 5_000,
        "eps_start": 1.0, "eps_decay": 0.99, "eps_min": 0.02, "episodes": 10_000, "steps": 0, "n_step": 1, "hold": 0,
        "reward_scale": 1.0, "priority": 0.0, "learn_start": 32, "lr_switch": "0", "train_noise": "none",
        "show_jump": "no", "precision": "float32", "eval_every": 0},
    "quick": {  # everything once, in under half a minute; too short to learn anything worth seeing
        "steps": 800, "memory": 2_000, "learn_start": 200, "copy": 50, "eps_decay": 0.97, "envs": 4,
        "eval_every": 800, "eval_episodes": 2},
}
LIMITS = ("episodes", "steps", "minutes", "until_clear", "checkpoint_minutes", "threads")  # may change on --resume
TRAINED = Path(__file__).parent / "results" / "mario_1-1.pt"  # the network that comes with the program


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def number(kind, low, high=math.inf):
    """A converter for argparse that refuses what is out of range, and says what is right."""
    def convert(text):
        try:
            if low <= kind(text) <= high:
                return kind(text)
        except ValueError:
            pass
        limit = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number {limit}")
    return convert


def several(convert):
    """A converter for several such numbers with commas between them. They stay text, as typed."""
    def check(text):
        for part in text.split(","):
            convert(part)
        return text
    return check


def matching(pattern, example):
    def convert(text):
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is not like {example}")
        return text
    return convert


def build_parser():
    parser = Parser(prog="mario_ddqn.py", argument_default=argparse.SUPPRESS, allow_abbrev=False,
                    description="Deep Q-learning plays Super Mario Bros World 1-1 from pixels.")
    whole, real = (lambda low, high=math.inf: number(int, low, high)), (lambda low, high: number(float, low, high))

    what = parser.add_argument_group("what to do (without any of these: train)")
    what.add_argument("--resume", metavar="RUN", help="continue a run; only its limits may change")
    what.add_argument("--plot", nargs="+", metavar="RUN", help="draw the reward curves of runs into --out FILE")
    trained = {"nargs": "?", "const": str(TRAINED), "metavar": "RUN|FILE"}
    what.add_argument("--evaluate", **trained, help="clear rate of a run's best network (or the trained one) over "
                      "--episodes (default: 100) with --noise")
    what.add_argument("--watch", **trained, help="look at it play --episodes (default: 1)")
    what.add_argument("--record", metavar="CLIP", type=matching(r".+\.(gif|mp4)", "clip.gif or clip.mp4"),
                      help="with --watch: write a .gif or .mp4 instead of opening a window")
    what.add_argument("--noise", choices=NOISES, default="none", help="for --evaluate and --watch: noop (0 to 30 idle "
                      "steps first), epsilon (0.05 random actions), sticky (the last action again with probability "
                      "0.25), none (default)")
    what.add_argument("--out", metavar="FILE", help="the file that --plot (png, svg, pdf) or --evaluate (json) writes")
    what.add_argument("--x", choices=("episodes", "steps", "minutes"), default="episodes", help="axis of --plot")
    what.add_argument("--name", help="the new run's folder below --runs (default: single-1, tutorial-1, …)")
    what.add_argument("--runs", metavar="DIR", default="runs", help="the folder of all runs (default: runs)")
    what.add_argument("--force", action="store_true", default=False, help="overwrite the run of that name")

    def setting(group, name, default, help, **more):
        DEFAULTS[name.replace("-", "_")] = default
        group.add_argument("--" + name, help=f"{help} (default: {default})", **more)

    group = parser.add_argument_group("algorithm")
    setting(group, "double", "single", "target rule. Without it: one network; alone: the tutorial's target network; "
            "hasselt: van Hasselt's double rule", nargs="?", const="tutorial", choices=RULES[1:])
    setting(group, "preset", "default", "a set of settings", choices=PRESETS)
    setting(group, "gamma", 0.95, "discount γ of one step", type=real(0, 1))
    setting(group, "n-step", 5, "rewards summed before the network's estimate takes over", type=whole(1, 100))
    setting(group, "lr", 2.5e-4, "learning rate of Adam", type=real(1e-8, 1))
    setting(group, "lr-switch", "40000", "updates until the learning rate becomes --lr-late; 0: it never does; or "
            "several: 40000,125000, with as many of --lr-late", type=several(whole(0)))
    setting(group, "lr-late", "5e-05", "the later learning rate, or several: 5e-5,1e-5", type=several(real(1e-8, 1)))
    setting(group, "average", 0, "the network that exams see and best.pt keeps is a mean. 0: of about the last 1,000 "
            "updates; P: of the whole run, the n-th network with weight n^P", type=real(0, 100))
    setting(group, "batch", 32, "transitions per update", type=whole(1, 4096))
    setting(group, "train-every", 4, "environment steps per update", type=whole(1, 10_000))
    setting(group, "copy", 500, "updates between two copies to the target network", type=whole(1))
    setting(group, "memory", 100_000, "frames in the replay memory, 7067 bytes each", type=whole(1000))
    setting(group, "learn-start", 2_000, "frames in memory before the first update", type=whole(1))
    setting(group, "priority", 0.5, "exponent of prioritised replay; 0: every transition alike", type=real(0, 1))
    setting(group, "reward-scale", 0.00667, "factor on the reward before it is learnt from", type=real(1e-6, 1e3))
    setting(group, "eps-start", 1.0, "first ε", type=real(0, 1))
    setting(group, "eps-decay", 0.9995, "factor on ε per update", type=real(0, 1))
    setting(group, "eps-min", 0.02, "last ε", type=real(0, 1))
    setting(group, "hold", 16, "longest hold of a random action in steps; 0: plain ε-greedy", type=whole(0, 1000))
    names = "|".join(NOISES)
    setting(group, "train-noise", "noop", "noise in the training games, as --noise, or several: noop,epsilon. Of "
            "random and sticky actions the agent remembers what it chose, not what came of it",
            type=matching(f"({names})(,({names}))*", "noop or noop,epsilon"))
    setting(group, "flag-bonus", 0, "points for the flag in what is learnt from; the game pays nothing for it",
            type=real(0, 1000))
    group = parser.add_argument_group("run")
    setting(group, "episodes", 10_000, "episodes to train", type=whole(1))
    setting(group, "steps", 500_000, "stop after so many environment steps; 0: no limit", type=whole(0))
    setting(group, "minutes", 0, "stop after so many minutes; 0: no limit", type=real(0, 1e6))
    setting(group, "until-clear", 0, "stop when an exam clears this share; 0: never", type=real(0, 1))
    setting(group, "eval-every", 25_000, "environment steps between exams; 0: no exams", type=whole(0))
    setting(group, "eval-episodes", 20, "episodes of an exam", type=whole(1))
    setting(group, "checkpoint-minutes", 10, "minutes between checkpoints", type=real(0, 1e6))
    setting(group, "stage", "1-1", "world and stage", type=matching("[1-8]-[1-4]", "1-1"))
    setting(group, "show-jump", "yes", "a white line above the picture while the jump button is down",
            choices=("yes", "no"))
    setting(group, "envs", 0, "games side by side; 1: the tutorial's serial loop; 0: 8, or one per core where "
            "there are more, up to 32", type=whole(0, 256))
    setting(group, "seed", 0, "start of every random generator", type=whole(0, 2**31))
    setting(group, "device", "auto", "where the networks calculate", choices=("auto", "cpu", "cuda"))
    setting(group, "precision", "auto", "auto: bfloat16 on processors that have it",
            choices=("auto", "float32", "bfloat16"))
    setting(group, "threads", 0, "threads of PyTorch; 0: its own choice", type=whole(0, 1024))
    return parser


def parse_args(argv=None):
    """What was typed, over the preset, over the defaults. `settings` is the part that belongs to a run."""
    typed = vars(build_parser().parse_args(argv))
    modes = [name for name in ("resume", "plot", "evaluate", "watch", "record") if name in typed]
    if len(modes) > 1 and modes != ["watch", "record"]:
        raise UserError(f"--{modes[0]} and --{modes[1]} do not go together")
    args = argparse.Namespace(mode=modes[0] if modes else "train", typed=typed, out=None, name=None, record=None,
                              watch=str(TRAINED))
    vars(args).update({**DEFAULTS, **PRESETS[typed.get("preset", "default")], **typed})
    if args.envs == 0:  # every core needs a game; 8 are what the results in README were made with
        args.envs = min(max(8, os.cpu_count() or 1), 32)
    if args.mode in ("evaluate", "watch", "record"):
        args.episodes = typed.get("episodes", 100 if args.mode == "evaluate" else 1)
    args.settings = argparse.Namespace(**{name: getattr(args, name) for name in DEFAULTS})
    return args


def start(args):
    """A new run in a new folder."""
    name = args.name or next(name for k in range(1, 10**6)
                             if not Path(args.runs, name := f"{args.double}-{k}").exists())
    folder = Path(args.runs, name)
    if folder.exists() and not args.force:
        raise UserError(f"--name: {folder} exists already; --force overwrites it, --resume {folder} continues it")
    print(f"run {folder}")
    run(args.settings, folder)


def resume(args):
    """An earlier run, from its last checkpoint."""
    folder = Path(args.resume)
    checkpoint, saved = load_file(folder / "last.pt")
    if set(saved) != set(DEFAULTS):
        raise UserError(f"{folder / 'last.pt'}: written by another version of this program, with other settings")
    settings = read_settings(folder)
    if any(settings.get(name) != saved[name] for name in DEFAULTS if name not in LIMITS):
        raise UserError(f"{folder}: last.pt and settings.json belong to different runs")
    for name in args.typed:
        if name not in LIMITS and name in DEFAULTS:
            raise UserError(f"--{name.replace('_', '-')}: a resumed run keeps its settings, except --"
                            + ", --".join(LIMITS).replace("_", "-"))
    limits = {name: args.typed[name] for name in LIMITS if name in args.typed}
    run(argparse.Namespace(**{**saved, **limits}), folder, checkpoint)


def plot(args):
    if not args.out or Path(args.out).suffix not in (".png", ".svg", ".pdf"):
        raise UserError("--plot: --out FILE is missing, a .png, .svg or .pdf")
    plot_rewards([Path(name) for name in args.plot], Path(args.out), args.x)
    print(f"saved {args.out}")


def main(argv=None):
    try:
        args = parse_args(argv)
        for out in (args.out, args.record):
            if out and not Path(out).parent.is_dir():
                raise UserError(f"{out}: there is no folder {Path(out).parent}")
        modes = {"resume": resume, "plot": plot, "evaluate": evaluate, "watch": show, "record": show}
        modes.get(args.mode, start)(args)
        return 0
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'writing failed'}: {error.strerror}"
    except MemoryError:
        message = "not enough memory: a smaller --memory or fewer --envs need less"
    except KeyboardInterrupt as stopped:  # a training that was asked to stop has saved everything and names the signal
        if stopped.args:
            return 128 + stopped.args[0]
        print("mario_ddqn.py: stopped at once; a training keeps its last checkpoint", file=sys.stderr)
        return 130
    print("mario_ddqn.py:", *message.splitlines(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
