"""Deep Q-learning plays Super Mario Bros (NES) World 1-1 from pixels.

    python mario_ddqn.py --double            train (every setting: --help)
    python mario_ddqn.py --evaluate RUN      how often does it clear the level?
    python mario_ddqn.py --watch RUN         look at it play

"The tutorial" is Andrew Grebenisan, Play Super Mario Bros with a Double Deep Q-Network (Paperspace blog):
https://blog.paperspace.com/building-double-deep-q-network-super-mario-bros/
Read this file from top to bottom. The letters in the shapes: B = batch, E = emulators, n = steps of a return.
"""
import argparse
import contextlib
import csv
import io
import json
import math
import os
import shlex
import signal
import sys
import time
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C during the slow imports ends without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
# PyTorch's threads wait for each other at every operation, very long beside a busy program.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch
from filelock import FileLock, Timeout  # comes with torch
from matplotlib.figure import Figure
from PIL import Image  # comes with matplotlib
from torch import nn
from tqdm import tqdm

# The game's packages come in two generations: gym and gym-super-mario-bros 7 up to Python 3.12, Gymnasium and
# gym-super-mario-bros 9 from 3.13 on (requirements.txt). They differ here and in `make_game`.
if sys.version_info < (3, 13):
    with contextlib.redirect_stderr(io.StringIO()):  # gym 0.26 says that it is retired
        import gym
    gym.logger.set_level(gym.logger.ERROR)  # "-v0 is out of date": it is the original game
else:
    import gymnasium as gym
import gym_super_mario_bros  # noqa: F401 - registers the game
from gym_super_mario_bros.actions import RIGHT_ONLY
from nes_py.wrappers import JoypadSpace

cv2.setNumThreads(1)  # one frame is too small to share out


# ===== 1. Settings. In: what was typed, or a preset. Out: settings that are known to be allowed.

class UserError(Exception):
    """Something the user can mend. Its text is the one line they read; the exit code is 2."""


RULES = ("single", "tutorial", "hasselt")
NOISES = ("none", "noop", "epsilon", "sticky")
STAGES = tuple(f"{world}-{stage}" for world in range(1, 9) for stage in range(1, 5))


def setting(default, help, low=None, high=None, choices=None):
    """One line of `Settings`: its default, its help, and what is allowed, a range or some choices."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """All settings of a training. UserError: a value of the wrong type or out of its range."""

    double: str = setting("single", "target rule; alone: the tutorial's target network", choices=RULES)
    gamma: float = setting(0.95, "discount γ of one step", 0, 1)
    n_step: int = setting(5, "rewards summed before the network's estimate takes over", 1, 100)
    lr: float = setting(2.5e-4, "learning rate of Adam at the start", 1e-8, 1)
    lr_end: float = setting(1e-5, "learning rate at the end of --steps", 1e-8, 1)
    batch: int = setting(32, "transitions per update", 1, 4096)
    train_every: int = setting(4, "environment steps per update", 1, 10_000)
    copy_every: int = setting(500, "updates between two copies to the target network", 1, 10**9)
    memory: int = setting(100_000, "frames in the replay memory, 7,070 bytes each", 1000, 10**8)
    learn_start: int = setting(2_000, "transitions in memory before the first update", 1, 10**8)
    priority: float = setting(0.5, "exponent of prioritised replay; 0: all transitions alike", 0, 1)
    reward_scale: float = setting(0.00667, "factor on the reward before it is learnt from", 1e-6, 1e3)
    flag_bonus: float = setting(50.0, "points for the flag; the game pays none", 0, 1000)
    eps_decay: float = setting(0.9995, "factor on ε per update, from 1 on", 0, 1)
    eps_min: float = setting(0.02, "last ε", 0, 1)
    train_noise: str = setting("noop", "noise in the training games, as --noise", choices=NOISES)
    practice: float = setting(0.25, "share of training games that begin within the last cleared one", 0, 1)
    search: float = setting(0.0, "share that begin late in the furthest game, before the first clear", 0, 1)
    patience: int = setting(150, "steps without progress that end a training game", 1, 10**6)
    episodes: int = setting(10_000, "stop after so many episodes; practice does not count", 1, 10**6)
    steps: int = setting(400_000, "stop after so many environment steps; 0: no limit", 0, 10**9)
    stage: str = setting("1-1", "world and stage; several, as 1-1,1-2, share the games out", choices=STAGES)
    show_jump: bool = setting(True, "draw a line while the jump button is down", choices=(True, False))
    envs: int = setting(8, "games side by side", 1, 64)
    seed: int = setting(0, "start of the random generator", 0, 2**31)
    bfloat16: bool = setting(True, "learn in bfloat16 where the CPU has it", choices=(True, False))

    def __post_init__(self):
        for spec in fields(self):
            flag, value = "--" + spec.name.replace("_", "-"), getattr(self, spec.name)
            low, high, choices = (spec.metadata[name] for name in ("low", "high", "choices"))
            if choices:
                given = str(value).split(",") if spec.name == "stage" else [value]
                if not all(choice in choices for choice in given):
                    raise UserError(f"{flag}: {value!r} is not one of {', '.join(map(str, choices))}")
            elif type(value) not in (int, spec.type) or not low <= value <= high:  # True is an int, too
                kind = "whole number" if spec.type is int else "number"
                raise UserError(f"{flag}: {value!r} is not a {kind} from {low} to {high}")
        if self.memory < 2 * max(self.learn_start, self.envs * (self.n_step + 8)):
            raise UserError(f"--memory {self.memory} is too small for --learn-start {self.learn_start}, "
                            f"--n-step {self.n_step} and --envs {self.envs}")
        if self.envs < len(self.stage.split(",")):
            raise UserError(f"--envs {self.envs} is too small for --stage {self.stage}: each needs a game")


PRESETS = {
    "tutorial": {  # the tutorial's settings, to the letter
        "envs": 1, "gamma": 0.90, "lr": 2.5e-4, "lr_end": 2.5e-4, "batch": 32, "memory": 30_000,
        "train_every": 1, "copy_every": 5_000, "eps_decay": 0.99, "eps_min": 0.02,
        "episodes": 10_000, "steps": 0, "n_step": 1, "reward_scale": 1.0, "flag_bonus": 0.0, "priority": 0.0,
        "learn_start": 32, "train_noise": "none", "practice": 0.0, "patience": 10**6, "show_jump": False,
        "bfloat16": False},
    "quick": {  # everything once, in half a minute
        "steps": 800, "memory": 2_000, "learn_start": 200, "copy_every": 50, "eps_decay": 0.97},
}


# ===== 2. Environment. In: a stage, an action (0 to 4). Out: a state (4, 84, 84) float32 in [0, 1], a reward.

def emulator_picture(obs):
    """The emulator's own picture, (240, 256, 4) uint8 in the order B, G, R, unused. nes-py hands out
    a view of it as RGB, (240, 256, 3), which runs backwards through the memory and is slow to copy."""
    if obs.strides == (1024, 4, -1):
        return np.lib.stride_tricks.as_strided(obs[:, :, ::-1], (240, 256, 4), (1024, 4, 1))
    return cv2.cvtColor(np.ascontiguousarray(obs), cv2.COLOR_RGB2BGRA)


class MaxAndSkipEnv(gym.Wrapper):
    """Repeats an action for four frames and adds up the rewards. Shows the pixel-wise maximum of the last two
    frames, because the NES draws some sprites on every other frame only (Mnih et al. 2015, Methods)."""

    def step(self, action):
        total_reward = 0.0
        for _ in range(4):
            obs, reward, terminated, truncated, info = self.env.step(action)
            self.frames.append(emulator_picture(obs).copy())  # the next frame is drawn into the same place
            total_reward += reward
            if terminated or truncated:
                break
        info = {**info, "picture": self.frames[-1]}  # in colour
        return np.maximum(*self.frames), total_reward, terminated, truncated, info  # (240, 256, 4) uint8

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.frames = deque([emulator_picture(obs).copy()], maxlen=2)
        return self.frames[0], {**info, "picture": self.frames[0]}


class ProcessFrame84(gym.ObservationWrapper):
    """Grey (0.299 R + 0.587 G + 0.114 B), 84 wide × 110 high; rows 18 to 101 are kept, without the score.

    With `show_jump` a white line, the first four rows, says that button A is down. Mario jumps only when the button
    goes down anew, and no frame shows it: without the line the agent can hold A in front of a step for ever."""

    def __init__(self, env, show_jump=False):
        super().__init__(env)
        self.show_jump = show_jump

    def step(self, action):
        obs, *others = super().step(action)
        if self.show_jump and action & 1:  # one bit per button, as JoypadSpace has translated it; A is the lowest
            obs[:4] = 255
        return obs, *others

    def observation(self, obs):
        grey = cv2.cvtColor(obs, cv2.COLOR_BGRA2GRAY)                       # (240, 256) uint8
        small = cv2.resize(grey, (84, 110), interpolation=cv2.INTER_AREA)   # (110, 84) uint8
        return small[18:102, :, None]                                       # (84, 84, 1) uint8


class ImageToPyTorch(gym.ObservationWrapper):
    """Channel first, as PyTorch's convolutions want it."""

    def observation(self, obs):
        return np.moveaxis(obs, 2, 0)  # (1, 84, 84) uint8


class BufferWrapper(gym.ObservationWrapper):
    """The last four frames as one observation: a single one does not show which way Mario moves. Before an
    episode's first frame there are black ones."""

    def reset(self, **kwargs):
        self.buffer = np.zeros((4, 84, 84), np.uint8)
        return super().reset(**kwargs)

    def observation(self, obs):
        self.buffer = np.concatenate([self.buffer[1:], obs])  # (4, 84, 84) uint8, oldest first
        return self.buffer


class ScaledFloatFrame(gym.ObservationWrapper):
    """÷ 255: networks learn best from inputs between 0 and 1."""

    observation_space = gym.spaces.Box(0.0, 1.0, (4, 84, 84), np.float32)

    def observation(self, obs):
        return obs.astype(np.float32) / 255.0  # (4, 84, 84) float32


class TutorialReward(gym.Wrapper):
    """Version 7's reward, for version 9 only: Δx + Δclock − 25 for dying, clipped to ±15."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.x, self.clock = info["x_pos"], info["time"]
        return obs, info

    def step(self, action):
        obs, _, terminated, truncated, info = self.env.step(action)
        moved, ticked = info["x_pos"] - self.x, info["time"] - self.clock
        self.x, self.clock = info["x_pos"], info["time"]
        reward = (moved if abs(moved) <= 5 else 0) + min(ticked, 0)  # no move is faster, no clock runs backwards
        reward -= 25 * (info["is_dying"] or info["is_dead"])
        return obs, float(np.clip(reward, -15, 15)), terminated, truncated, info


def make_game(stage):
    """The bare game, (240, 256, 3) uint8, and its reward, the same in both generations of packages."""
    if sys.version_info < (3, 13):  # gym 0.26: nes-py 8 still speaks the API before it
        return gym.make(f"SuperMarioBros-{stage}-v0", apply_api_compatibility=True, disable_env_checker=True)
    return TutorialReward(gym.make(f"SuperMarioBros-{stage}-v0", disable_env_checker=True))


def make_env(stage="1-1", show_jump=True):
    """The game as the agent sees it: states (4, 84, 84) float32 in [0, 1], five actions (RIGHT_ONLY). The reward
    of a frame is Δx + Δclock − 25 for dying, clipped to ±15; a step adds up four frames."""
    env = MaxAndSkipEnv(make_game(stage))
    env = ProcessFrame84(env, show_jump)
    env = ImageToPyTorch(env)
    env = BufferWrapper(env)
    env = ScaledFloatFrame(env)
    return JoypadSpace(env, RIGHT_ONLY)


def step_game(env, action):
    """`env.step(action)`. UserError: the emulator broke down."""
    try:
        return env.step(action)
    except Exception as error:
        raise UserError(f"the emulator broke down: {error!r}") from error


class Episode:
    """One game: its noise, its actions, and what it has come to.

    The game has no randomness, so a greedy agent repeats one trajectory. Noise makes the games differ:
    "noop" starts with 0 to 30 idle steps, "epsilon" plays a random action with probability 0.05, "sticky" repeats
    the last one with probability 0.25 (Machado et al. 2018, section 5). "random" is for `next_episode`."""

    def __init__(self, rng, noise="none"):
        self.rng, self.noise = rng, noise
        # All actions that reached the game; `begin` plays those that are in it at the start.
        self.actions = [0] * int(rng.integers(31)) if noise == "noop" else []
        self.practice = False  # it begins within another game
        self.total_reward, self.furthest_x, self.standing, self.cleared = 0.0, 0, 0, False

    def apply_noise(self, action):
        """The chosen action goes in, the action that reaches the game comes out (int)."""
        if self.noise == "epsilon" and self.rng.random() < 0.05:
            action = self.rng.integers(len(RIGHT_ONLY))
        elif self.noise == "sticky" and self.rng.random() < 0.25:
            action = self.actions[-1] if self.actions else 0
        elif self.noise == "random":  # held for five steps on average, as a high jump needs it
            held = self.actions and self.rng.random() < 0.8
            action = self.actions[-1] if held else self.rng.integers(len(RIGHT_ONLY))
        self.actions.append(int(action))
        return self.actions[-1]

    def add(self, reward, info):
        self.total_reward += reward
        self.standing = 0 if info["x_pos"] > self.furthest_x else self.standing + 1  # steps without progress
        self.furthest_x = max(self.furthest_x, int(info["x_pos"]))
        self.cleared |= bool(info["flag_get"])


def begin(env, episode):
    """Starts the game and plays the actions that the episode has already: idle steps, another game's first steps or,
    on --resume, its own. nes-py 8 cannot store a game, but the same actions lead to the same state."""
    state, info = env.reset()
    for action in episode.actions:
        state, _, _, _, info = step_game(env, action)
    return state, info  # (4, 84, 84) float32


# ===== 3. Network. In: states (B, 4, 84, 84) float32. Out: one Q-value for each action, (B, 5) float32.

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


# ===== 4. Agent. In: transitions (state, action, reward, next_state, terminal). Out: actions.

class ReplayMemory:
    """The last `capacity` frames of play, first in, first out, each stored once as 84×84 uint8.

    A state shares three of its four frames with the next one, so two float stacks per transition (225,800 bytes)
    hold mostly copies. Here every emulator writes a ring of single frames, and `sample` puts the stacks together
    again. An episode of T steps takes T + 4 places: the four frames of its first state, then one frame a step.

    The transition of a place starts in the state that ends with the place's frame. It can be drawn while its
    priority is above 0: from when its n steps are complete, or the episode is over, until a frame of its state
    is overwritten."""

    ARRAYS = ("actions", "rewards", "ends", "priority", "written", "first")
    TERMINATED, TRUNCATED = 1, 2

    def __init__(self, capacity, n_envs=1, n_step=1, gamma=1.0, state_shape=(4, 84, 84)):
        self.size = math.ceil(capacity / n_envs)  # places per emulator
        self.n_step, self.gamma, self.stack = n_step, gamma, state_shape[0]
        self.frames = np.empty((n_envs, self.size, *state_shape[1:]), np.uint8)  # takes memory only as it fills
        self.actions = np.zeros((n_envs, self.size), np.uint8)
        self.rewards = np.zeros((n_envs, self.size), np.float32)
        self.ends = np.zeros((n_envs, self.size), np.uint8)  # 0: the episode goes on after this step
        self.priority = np.zeros((n_envs, self.size), np.float64)
        self.written = np.zeros(n_envs, np.int64)            # frames so far; % size: the next place
        self.first = np.full(n_envs, -1, np.int64)           # the episode's first state; -1: none yet

    def __len__(self):
        """How many transitions can be drawn."""
        return np.count_nonzero(self.priority)

    def _write(self, frame, env):
        at = self.written[env] % self.size
        self.frames[env, at] = np.rint(frame * 255)  # (84, 84) float32 in [0, 1] -> uint8 again
        # The frame that was here is gone, and with it every state that it belonged to.
        self.priority[env, (at + np.arange(self.stack)) % self.size] = 0
        self.written[env] += 1

    def push(self, state, action, reward, next_state, terminal, truncated=False, env=0):
        """state, next_state: (4, 84, 84) float32 of emulator `env`, whose transitions come in order."""
        if self.first[env] < 0:  # an episode begins
            for frame in state:
                self._write(frame, env)
            self.first[env] = self.written[env] - 1
        now = self.written[env] - 1  # the frame that ends `state`
        at = now % self.size
        self.actions[env, at], self.rewards[env, at] = action, reward
        self.ends[env, at] = self.TERMINATED if terminal else self.TRUNCATED if truncated else 0
        highest = max(1.0, self.priority.max())  # a new transition is to be seen soon
        self._write(next_state[-1], env)
        complete = now - self.n_step + 1  # this transition has now got its n rewards
        if terminal or truncated:  # no more rewards come: the younger ones are complete, too
            self.priority[env, np.arange(max(complete, self.first[env]), now + 1) % self.size] = highest
            self.first[env] = -1
        elif complete >= self.first[env]:  # it belongs to this episode
            self.priority[env, complete % self.size] = highest

    def sample(self, batch, rng):
        """`batch` transitions, each drawn in proportion to its priority. Returns states (B, 4, 84, 84) uint8,
        actions (B,) int64, rewards (B,) float32 summed over up to n steps, next_states (B, 4, 84, 84) uint8,
        terminals (B,) float32, discounts (B,) float32, the powers of γ. `self.drawn` keeps their places."""
        priority = self.priority.ravel()                                      # (E · size,)
        places = rng.choice(len(priority), batch, p=priority / priority.sum())
        env, at = self.drawn = np.divmod(places, self.size)                   # (B,) emulators, (B,) places
        ahead = (at[:, None] + np.arange(self.n_step)) % self.size            # (B, n)
        ends = self.ends[env[:, None], ahead]                                 # (B, n)
        ours = np.cumsum(ends > 0, axis=1) == (ends > 0)                      # (B, n) no end before this step
        # R = r_t + γ r_{t+1} + … + γ^{m-1} r_{t+m-1},  m = n, or fewer when the episode ends before
        powers = self.gamma ** np.arange(self.n_step)                         # (n,)
        rewards = (self.rewards[env[:, None], ahead] * powers * ours).sum(1)  # (B,)
        steps = ours.sum(1)                                                   # (B,) m
        terminals = ((ends == self.TERMINATED) & ours).any(1)                 # (B,)
        actions = self.actions[env, at].astype(np.int64)                      # (B,)
        rewards, terminals, discounts = (x.astype(np.float32) for x in (rewards, terminals, self.gamma**steps))
        return self._stacks(env, at), actions, rewards, self._stacks(env, at + steps), terminals, discounts

    def _stacks(self, env, at):
        back = np.arange(1 - self.stack, 1)                                   # (4,): -3, -2, -1, 0
        return self.frames[env[:, None], (at[:, None] + back) % self.size]    # (B, 4, 84, 84) uint8

    def state_dict(self):
        """Everything in it, for a checkpoint; the frames compressed to about a tenth."""
        frames = [zlib.compress(ring[:n], level=1) for ring, n in zip(self.frames, self.written, strict=True)]
        return {"frames": frames, **{name: torch.from_numpy(getattr(self, name)) for name in self.ARRAYS}}

    def load_state_dict(self, saved):
        for name in self.ARRAYS:
            getattr(self, name)[:] = saved[name].numpy()
        for env, compressed in enumerate(saved["frames"]):
            frames = np.frombuffer(zlib.decompress(compressed), np.uint8)
            self.frames[env, :self.written[env]] = frames.reshape(-1, *self.frames.shape[2:])


class DQNAgent:
    """Deep Q-learning (Mnih et al. 2015). The local network acts and learns. The target network, a copy of it
    that is refreshed every `copy_every` updates, values the next state; `td_target` shows how."""

    PARTS = ("local_net", "target_net", "optimizer", "scheduler", "memory")

    def __init__(self, settings, input_shape=(4, 84, 84), n_actions=5):
        self.settings, self.n_actions = settings, n_actions
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        fast_bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
        self.bf16 = settings.bfloat16 and self.device == "cpu" and fast_bf16
        self.rng = np.random.default_rng(settings.seed)  # everything random in a run comes from here
        with torch.random.fork_rng(devices=[]):  # except the first weights
            torch.manual_seed(settings.seed)
            self.local_net = DQNSolver(input_shape, n_actions).to(self.device, memory_format=torch.channels_last)
        self.target_net = self.local_net if settings.double == "single" else deepcopy(self.local_net)
        self.optimizer = torch.optim.Adam(self.local_net.parameters(), lr=settings.lr, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.lr_factor)
        self.memory = ReplayMemory(settings.memory, settings.envs, settings.n_step, settings.gamma, input_shape)
        self.steps, self.updates = 0, 0
        self.learnt = []  # (loss, mean Q) of the updates since the last row

    def lr_factor(self, updates):
        """The learning rate as a share of `lr`: it falls by one factor per update, to about `lr_end` at the end."""
        done = min(1.0, updates * self.settings.train_every / (self.settings.steps or math.inf))
        return (self.settings.lr_end / self.settings.lr) ** done

    @property
    def epsilon(self):
        """ε after so many updates: eps_decay^updates, but never below eps_min."""
        return max(self.settings.eps_min, self.settings.eps_decay**self.updates)

    @torch.no_grad()
    def q_values(self, states):
        """states (B, 4, 84, 84) float32 in [0, 1] -> (B, n_actions) float32, by the local network."""
        return self.local_net(torch.from_numpy(states).to(self.device)).cpu().numpy()

    def act(self, states):
        """ε-greedy on the local network: states (E, 4, 84, 84) float32 -> actions (E,) int64."""
        explores = self.rng.random(len(states)) < self.epsilon                 # (E,)
        random_actions = self.rng.integers(self.n_actions, size=len(states))   # (E,)
        return np.where(explores, random_actions, self.q_values(states).argmax(1))

    def remember(self, state, action, reward, next_state, terminal, truncated=False, env=0):
        """One transition of emulator `env` into the replay memory."""
        self.memory.push(state, action, reward * self.settings.reward_scale, next_state, terminal, truncated, env)

    def recall(self):
        """A batch of tensors: state, action, reward, next_state, terminal, discount (see ReplayMemory.sample)."""
        sample = self.memory.sample(self.settings.batch, self.rng)
        state, action, reward, next_state, terminal, discount = (torch.from_numpy(x).to(self.device) for x in sample)
        state, next_state = (x.contiguous(memory_format=torch.channels_last).float().div_(255)
                             for x in (state, next_state))  # (B, 4, 84, 84) float32
        return state, action, reward, next_state, terminal, discount

    def td_target(self, reward, next_state, terminal, discount):
        """What Q(s, a) should have been, (B,) float32. The rules differ in `next_value`."""
        if self.settings.double == "single":
            # r + γ max_a Q_local(s', a)                   (one network on both sides; Mnih et al. 2013)
            next_value = self.local_net(next_state).max(1).values  # (B,)
        if self.settings.double == "tutorial":
            # r + γ max_a Q_target(s', a)                  (Mnih et al. 2015, eq. 2)
            next_value = self.target_net(next_state).max(1).values  # (B,)  <- changed: older copy
        if self.settings.double == "hasselt":
            # r + γ Q_target(s', argmax_a Q_local(s', a))  (van Hasselt, Guez and Silver 2016, eq. 4)
            best = self.local_net(next_state).argmax(1, keepdim=True)  # (B, 1)  <- changed: local picks
            next_value = self.target_net(next_state).gather(1, best).squeeze(1)  # (B,)  <- target values
        return reward + discount * next_value.float() * (1 - terminal)  # a terminal step's target is r

    def experience_replay(self):
        """One update, when there is enough to learn from."""
        if len(self.memory) < self.settings.learn_start:
            return
        if self.updates % self.settings.copy_every == 0:
            self.copy_model()
        state, action, reward, next_state, terminal, discount = self.recall()
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)
        with torch.no_grad(), autocast:  # no gradient through the target, in any rule
            td_target = self.td_target(reward, next_state, terminal, discount)              # (B,)
        with autocast:
            q_values = self.local_net(state).gather(1, action[:, None]).squeeze(1).float()  # (B,) Q(s, a)
        # L = mean w · Huber(Q(s, a) − target),  w ~ priority^-0.4: what is drawn more often weighs less
        weight = torch.from_numpy(self.memory.priority[self.memory.drawn] ** -0.4).float().to(self.device)  # (B,)
        huber = nn.functional.smooth_l1_loss(q_values, td_target, reduction="none")         # (B,)
        loss = (weight / weight.max() * huber).mean()
        if not torch.isfinite(loss):  # before it can spoil the weights
            raise UserError(f"the loss of update {self.updates} is {loss:.0f}: try a smaller --lr or --reward-scale")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        # p = (|δ| + 0.01)^priority: more of what surprised (Schaul et al. 2016, 3.3). With priority 0 all stay 1.
        td_error = (td_target - q_values.detach()).abs().cpu().numpy()                      # (B,) |δ|
        self.memory.priority[self.memory.drawn] = (td_error + 0.01) ** self.settings.priority
        self.updates += 1
        self.learnt.append((loss.item(), q_values.mean().item()))

    def copy_model(self):
        """local network -> target network"""
        self.target_net.load_state_dict(self.local_net.state_dict())

    def state_dict(self):
        """All that its next action and update depend on, for a checkpoint."""
        return {**{name: getattr(self, name).state_dict() for name in self.PARTS},
                "steps": self.steps, "updates": self.updates,
                "learnt": self.learnt, "generator": self.rng.bit_generator.state}

    def load_state_dict(self, saved):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(saved[name])
        self.steps, self.updates, self.learnt = int(saved["steps"]), int(saved["updates"]), list(saved["learnt"])
        self.rng.bit_generator.state = saved["generator"]


# ===== 5. Training loop. In: the settings. Out: a folder with settings, a CSV row per game, checkpoints, a plot.

FORMAT = 2  # of last.pt and network.pt; raised when older files no longer fit
COLUMNS = {"episode": int, "stage": str, "env_steps": int, "seconds": float, "return": float, "length": int,
           "furthest_x": int, "cleared": int, "epsilon": float, "mean_q": float, "loss": float}
CHECKPOINT_SECONDS = 600


def write_atomically(path, content):
    """Bytes into a file, whole or not at all: they go into another file, which then takes the name `path`."""
    unfinished = path.with_name("partial-" + path.name)
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written, the file before is untouched: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_tensors(path, content):
    """torch.save by way of memory, so that a full disk is an OSError that says so."""
    torch.save({"format": FORMAT, **content}, buffer := io.BytesIO())
    write_atomically(path, buffer.getbuffer())


@contextlib.contextmanager
def reading(path):
    """What goes wrong inside is the file's fault: UserError."""
    if not path.is_file():  # nor a pipe, which would never end
        raise UserError(f"{path}: no such file")
    try:
        yield
    except Exception as error:
        raise UserError(f"{path}: unreadable or of another version: {error!r:.100}") from error


def load_tensors(path):
    """A checkpoint or a network, read without running code from it. UserError: absent, damaged or foreign."""
    with reading(path):
        with zipfile.ZipFile(path) as archive:  # PyTorch does not compare its archive's checksums
            broken = archive.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True)
        if broken or content.get("format") != FORMAT:
            raise ValueError("its checksum or its format is wrong")
        if not all(weight.isfinite().all() for weight in content["local_net"].values()):
            raise ValueError("not every weight is a number")
        return content


def write_rows(folder, rows):
    csv.writer(text := io.StringIO(newline="")).writerows([COLUMNS, *(row.values() for row in rows)])
    write_atomically(folder / "episodes.csv", text.getvalue().encode())


def read_rows(folder):
    """The rows of the folder's episodes.csv, numbers as numbers. UserError: damaged."""
    with reading(folder / "episodes.csv"), open(folder / "episodes.csv", newline="") as file:
        return [{name: kind(row[name]) for name, kind in COLUMNS.items()} for row in csv.DictReader(file)]


@contextlib.contextmanager
def stop_signals():
    """Yields a list into which Ctrl-C or SIGTERM puts its number: the loop can finish its step and save."""
    stop = []

    def handle(number, _):
        stop.append(number)
        signal.signal(number, signal.default_int_handler)  # asked twice: at once

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save(folder, agent, games, rows, seconds):
    """last.pt: what `restore` needs beside the table. network.pt: the local network in half precision."""
    games = [{name: value for name, value in vars(episode).items() if name != "rng"} for episode in games]
    write_tensors(folder / "last.pt", {"rows": len(rows), "seconds": seconds, "games": games, **agent.state_dict()})
    weights = {name: weight.half().cpu().contiguous() for name, weight in agent.local_net.state_dict().items()}
    settings = json.dumps(asdict(agent.settings), indent=1)
    write_tensors(folder / "network.pt", {"settings": settings, "steps": agent.steps, "seconds": seconds,
                                          "local_net": weights})
    write_atomically(folder / "settings.json", settings.encode())  # --resume may have changed --steps or --episodes


def restore(folder, agent, games):
    """Puts folder/last.pt into the agent and the Episodes. Returns the rows up to then and the seconds."""
    checkpoint, rows = load_tensors(folder / "last.pt"), read_rows(folder)
    with reading(folder / "last.pt"):
        agent.load_state_dict(checkpoint)
        for episode, saved in zip(games, checkpoint["games"], strict=True):
            vars(episode).update(saved)
        count, seconds = int(checkpoint["rows"]), float(checkpoint["seconds"])
        if len(rows) < count:
            raise ValueError(f"episodes.csv lacks {count - len(rows)} of its rows")
    if agent.steps >= (agent.settings.steps or math.inf) or count >= agent.settings.episodes:
        raise UserError(f"{folder}: finished after {agent.steps} steps and {count} episodes; "
                        "a larger --steps or --episodes continues it")
    return rows[:count], seconds  # later rows will happen again


def next_episode(agent, kept, lengths):
    """A new training game. Some are practice: they begin at any step of `kept`, the stage's last cleared game, because
    its end is reached late and seldom. With --search there is practice before the first clear, too: `kept` is then the
    furthest game, and practice goes on at random from one of its last 40 steps (Ecoffet et al. 2021). Later it begins
    where the agent's own games end: within 20 steps of the mean of their `lengths`."""
    episode, settings = Episode(agent.rng, agent.settings.train_noise), agent.settings
    share = settings.practice if kept.cleared else settings.search
    if not share or agent.rng.random() >= share:
        return episode
    last = len(kept.actions)
    if settings.search and kept.cleared:
        last = min(last, max(40, int(np.mean(lengths)) + 20))
    first = max(0, last - 40) if settings.search else 0
    episode.actions, episode.practice = kept.actions[:agent.rng.integers(first, last)], True
    episode.noise = episode.noise if kept.cleared else "random"
    return episode


def make_row(number, stage, seconds, agent, episode):
    """The row of a finished episode. Loss and Q are means over the updates since the row before."""
    loss, mean_q = np.mean(agent.learnt or [(math.nan, math.nan)], axis=0)
    agent.learnt = []
    values = (number, stage, agent.steps, round(seconds, 5), episode.total_reward, len(episode.actions),
              episode.furthest_x, int(episode.cleared), round(agent.epsilon, 5), round(mean_q, 5), round(loss, 5))
    return dict(zip(COLUMNS, values, strict=True))


def run(settings, folder, resume=False):
    """Trains: a new run in `folder`, or the one there continued. Returns its rows, one for each game but practice."""
    agent = DQNAgent(settings, n_actions=len(RIGHT_ONLY))
    stages = (settings.stage.split(",") * settings.envs)[:settings.envs]  # of each game
    envs = [make_env(stage, settings.show_jump) for stage in stages]
    episodes = [Episode(agent.rng, settings.train_noise) for _ in stages]
    kept = {stage: Episode(agent.rng, settings.train_noise) for stage in dict.fromkeys(stages)}  # to be practised
    rows, seconds = restore(folder, agent, [*episodes, *kept.values()]) if resume else ([], 0.0)
    print(f"{folder}: learning on {agent.device}, with {agent.memory.frames.nbytes / 1e9:.2f} GB of replay memory")
    folder.mkdir(parents=True, exist_ok=True)
    with (FileLock(folder / "lock", timeout=0), stop_signals() as stop,
          ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as pool,  # one core is left to learn on
          tqdm(total=settings.steps or None, initial=agent.steps, unit="step", unit_scale=True, dynamic_ncols=True,
               bar_format="{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]") as bar):
        states = np.stack([state for state, _ in pool.map(begin, envs, episodes)])  # (E, 4, 84, 84) float32
        write_rows(folder, rows)
        started, finished = time.perf_counter() - seconds, False
        saved = seconds if resume else -math.inf  # a new run is saved at once
        while not (stop or finished):
            seconds = time.perf_counter() - started
            if seconds - saved > CHECKPOINT_SECONDS:
                save(folder, agent, [*episodes, *kept.values()], rows, seconds)
                saved = seconds
            # 1. Every game takes one step, in other threads.
            actions = [episode.apply_noise(action)
                       for episode, action in zip(episodes, agent.act(states), strict=True)]
            results = pool.map(step_game, envs, actions)
            # 2. Meanwhile the agent learns: one update for every `train_every` steps.
            for _ in range((agent.steps + len(envs)) // settings.train_every - agent.steps // settings.train_every):
                agent.experience_replay()
            # 3. It remembers what came of the step. Where a game is over, the next one begins.
            for e, (next_state, reward, terminated, truncated, info) in enumerate(results):
                episodes[e].add(reward, info)
                truncated = truncated or episodes[e].standing >= settings.patience
                bonus = settings.flag_bonus if info["flag_get"] else 0  # learnt from, not part of the returns
                agent.remember(states[e], actions[e], reward + bonus, next_state, terminated, truncated, env=e)
                states[e] = next_state
                agent.steps += 1
                if terminated or truncated:
                    if not episodes[e].practice:
                        rows.append(make_row(len(rows) + 1, stages[e], seconds, agent, episodes[e]))
                        write_rows(folder, rows)
                    game, before = episodes[e], kept[stages[e]]
                    if game.cleared or not before.cleared and game.furthest_x >= before.furthest_x:
                        kept[stages[e]] = game
                    lengths = [row["length"] for row in rows if row["stage"] == stages[e]][-100:]
                    episodes[e] = next_episode(agent, kept[stages[e]], lengths)
                    states[e] = begin(envs[e], episodes[e])[0]
                    mean, rate = np.mean([(row["return"], row["cleared"]) for row in rows[-100:]], axis=0)
                    bar.set_postfix_str(f"return {mean:.0f}, cleared {rate:.0%}, ε {agent.epsilon:.2f}", refresh=False)
            bar.update(len(envs))
            finished = len(rows) >= settings.episodes or agent.steps >= (settings.steps or math.inf)
        save(folder, agent, [*episodes, *kept.values()], rows, time.perf_counter() - started)
    if rows:
        plot_rewards([folder], folder / "rewards.png")
    print(f"finished: {len(rows)} episodes" if finished else f"stopped, it goes on with {command('--resume', folder)}",
          f"\nclear rate: {command('--evaluate', folder, '--noise', 'noop')}\n"
          f"watch it:   {command('--watch', folder)}")
    if not finished:
        raise KeyboardInterrupt(stop[0])  # the exit code names the signal
    return rows


# ===== 6. Evaluation and pictures. In: a trained network, or runs. Out: clear rates, clips, reward curves.

TRAINED = Path(__file__).parent / "results"  # mario_1-1.pt …, the networks that come with the program
MAX_STEPS = 1000  # of an evaluation game; a clear takes about 300
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's


def play_episode(env, q_values, episode, show=lambda *_: None):
    """Plays one game greedily, under the noise of `episode`; `show(picture, state, values, episode)` sees every step
    before it reaches the game, and the end. Returns "cleared", "died" or "out of time", and x at the end."""
    state, info = begin(env, episode)
    terminated = truncated = False
    while not (terminated or truncated) and len(episode.actions) < MAX_STEPS:
        values = q_values(state[None])[0]  # (5,)
        action = episode.apply_noise(values.argmax())
        show(info["picture"], state, values, episode)
        state, reward, terminated, truncated, info = step_game(env, action)
        episode.add(reward, info)
    show(info["picture"], state, values, episode)  # the end, with the values of the step before
    end = "cleared" if episode.cleared else "died" if terminated else "out of time"  # the game's clock at 0 is a death
    return end, int(info["x_pos"])


def play(q_values, settings, episodes, noise, seed):
    """Plays that many games, one thread per core. Returns (how it ended, x at the end, Episode) for each."""
    workers = min(episodes, os.cpu_count() or 1)
    idle_envs = [make_env(settings.stage, settings.show_jump) for _ in range(workers)]

    def play_one(number):  # the game's noise depends on its number, not on the thread
        env, episode = idle_envs.pop(), Episode(np.random.default_rng([seed, number]), noise)
        end, x = play_episode(env, q_values, episode)
        idle_envs.append(env)
        return end, x, episode

    results = []
    with ThreadPoolExecutor(workers) as pool, tqdm(total=episodes, unit="game") as bar:
        for result in pool.map(play_one, range(episodes)):  # after Ctrl-C no further game begins
            results.append(result)
            bar.set_postfix(cleared=sum(end == "cleared" for end, _, _ in results), refresh=False)
            bar.update()
    return results


def wilson(successes, n, z=1.96):
    """95 % interval of a rate (Wilson 1927): unlike ± 1.96 standard errors it holds near 0 and 1, too."""
    rate, shrink = successes / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / shrink
    return min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))  # despite rounding


def load_network(name=None, stage=None):
    """A run's folder, a file, or None for what comes with the program; a stage, or None for the network's first
    -> (path, function states -> Q-values, settings)."""
    if stage not in (None, *STAGES):
        raise UserError(f"--stage: {stage!r} is not one stage, from 1-1 to 8-4")
    path = TRAINED / f"mario_{stage or '1-1'}.pt" if name is None else Path(name)
    path = path / "network.pt" if path.is_dir() else path
    content, net = load_tensors(path), DQNSolver((4, 84, 84), len(RIGHT_ONLY)).eval()
    with reading(path):
        net.load_state_dict(content["local_net"])
        settings = Settings(**json.loads(content["settings"]))
    settings = replace(settings, stage=stage or settings.stage.split(",")[0])
    return path, torch.no_grad()(lambda states: net(torch.from_numpy(states)).numpy()), settings


def evaluate(name, noise="none", episodes=100, seed=0, stage=None, out=None):
    """Plays greedily, prints the clear rate and where lost games end, and writes both to a JSON file."""
    Settings(episodes=episodes, seed=seed, train_noise=noise)  # checks all three
    episodes = 1 if noise == "none" else episodes
    path, q_values, settings = load_network(name, stage)
    folder, stem = (path.parent, "") if path.name == "network.pt" else (Path("runs"), path.stem + "-")
    stem += f"{stage}-" if name and stage else ""  # a shipped network is named so
    out = checked_out(folder / f"evaluation-{stem}{noise}.json" if out is None else out, ".json")
    results = play(q_values, settings, episodes, noise, seed)
    lost = sorted((end, x) for end, x, _ in results if end != "cleared")
    cleared = episodes - len(lost)
    low, high = wilson(cleared, episodes)
    summary = {"network": path.name, "stage": settings.stage, "noise": noise, "seed": seed, "episodes": episodes,
               "cleared": cleared, "wilson_95": [low, high], "lost": lost}
    print(f"{path}: cleared {settings.stage} in {cleared} of {episodes} games with --noise {noise} " + (
        "(all such games are the same: not a rate)" if noise == "none"
        else f"(95 % interval of the rate: {low:.0%} to {high:.0%})"))
    for (end, x), times in Counter((end, x // 50 * 50) for end, x in lost).most_common(8):
        print(f"{times:6d} × {end} at x = {x} to {x + 49}")
    write_atomically(out, (json.dumps(summary) + "\n").encode())
    print(f"saved {out}")


def watch_panel(picture, state, points, past, episode):
    """The game, and beside it state, Q-values and action. picture: the emulator's, (240, 256, 4) uint8;
    state: (4, 84, 84) float32; points: (5,) Q-values; past: the highest of each step -> (672, 1280, 3) uint8 BGR."""
    white, blue, orange, red = (255, 255, 255), (233, 180, 86), (0, 159, 230), (80, 80, 255)  # B, G, R
    panel = np.full((672, 1280, 3), 24, np.uint8)
    # A television does not show the first and the last 8 rows either.
    panel[:, :768] = cv2.resize(picture[8:232, :, :3], (768, 672), interpolation=cv2.INTER_NEAREST)

    def write(text, x, y, colour=white):
        cv2.putText(panel, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.75, colour, 2, cv2.LINE_AA)

    write("State: the last four frames", 784, 34)
    for k, frame in enumerate(state):
        panel[50:168, 784 + 122 * k:902 + 122 * k] = cv2.resize(frame * 255, (118, 118))[:, :, None]

    write("Q-values: points to come", 784, 218)
    chosen, played, buttons = points.argmax(), episode.actions[-1], ["+".join(names) for names in RIGHT_ONLY]
    spread = max(30, np.ptp(points))  # at least 30 points, so that small differences look small
    for action, name in enumerate(buttons):
        y, length = 256 + 38 * action, int(220 * (1 - (points[chosen] - points[action]) / spread))
        bar, colour = (orange, orange) if action == chosen else (blue, white)
        cv2.rectangle(panel, (970, y - 20), (974 + length, y + 4), bar, -1)
        write(name, 784, y, colour)
        write(f"{points[action]:.0f}", 1208, y, colour)

    if episode.cleared:
        write("Cleared!", 784, 470, orange)
    elif played == chosen:
        write(f"Action: {buttons[played]}", 784, 470, orange)
    else:
        write(f"Noise: {buttons[played]} instead", 784, 470, red)
        cv2.rectangle(panel, (966, 232 + 38 * played), (1266, 264 + 38 * played), red, 2)

    write("Value of the state, last 100 steps", 784, 524)
    curve = [(784 + 480 * k // 100, int(650 - 100 * value / max(*past, 1))) for k, value in enumerate(past)]
    cv2.polylines(panel, [np.array(curve)], False, blue, 2, cv2.LINE_AA)
    cv2.line(panel, (784, 650), (1264, 650), white, 1)  # zero points
    return panel


def open_window(title="Mario: space pauses, s steps, 1 to 4 set the speed, q quits"):
    """A function that shows pictures in a window and obeys its keys; KeyboardInterrupt: the window is closed."""
    delays = {"1": 250, "2": 110, "3": 45, "4": 10}  # milliseconds; 3 is about the console's speed
    delay, paused = delays["3"], False
    cv2.namedWindow(title, cv2.WINDOW_AUTOSIZE | cv2.WINDOW_GUI_NORMAL)  # without a toolbar

    def look(picture):
        nonlocal delay, paused
        cv2.imshow(title, picture)
        while True:
            key = chr(cv2.waitKey(delay) & 255)
            if key in "q\x1b" or cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) < 1:
                raise KeyboardInterrupt
            delay, paused = delays.get(key, delay), {"s": True, " ": not paused}.get(key, paused)
            if key == "s" or not paused:
                return
    return look


def watch(name, noise="none", episodes=1, seed=0, stage=None, out=None):
    """Greedy play in a window, about 15 pictures a second, or as a GIF."""
    Settings(episodes=episodes, seed=seed, train_noise=noise)  # checks all three
    if out is None and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        raise UserError("--watch: there is no display here; --out clip.gif writes a file instead")
    path, q_values, settings = load_network(name, stage)
    clip = None if out is None else checked_out(out, ".gif")
    panels, past = [], deque(maxlen=100)
    look = panels.append if clip else open_window()

    def show(picture, state, values, episode):
        points = values / settings.reward_scale
        past.append(points.max())
        panel = watch_panel(picture, state, points, past, episode)
        if clip:  # in half its size: a long game's panels would take gigabytes
            panel = cv2.resize(panel, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        look(panel)

    with contextlib.suppress(KeyboardInterrupt):
        for number in range(episodes):
            episode = Episode(np.random.default_rng([seed, number]), noise)
            end, x = play_episode(make_env(settings.stage, settings.show_jump), q_values, episode, show)
            print(f"{path}: {end} at x = {x}, return {episode.total_reward:.0f}, {len(episode.actions)} steps")
            if clip is None and chr(cv2.waitKey(2000) & 255) in "q\x1b":  # 2 s to see the end
                break
    if panels:
        write_clip(clip, panels)
        print(f"saved {clip}")


def write_clip(path, pictures):
    """pictures: (height, width, 3) uint8 BGR each -> a GIF of every second and the last. One palette for all and
    no dithering keep it small."""
    shown = [picture[:, :, ::-1] for picture in [*pictures[:-1:2], pictures[-1]]]  # RGB
    palette = Image.fromarray(np.vstack(shown[::20])).quantize(64)
    first, *others = (Image.fromarray(rgb).quantize(palette=palette, dither=Image.Dither.NONE) for rgb in shown)
    durations = [133] * len(others) + [2000]  # milliseconds; time to see how it ended
    first.save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    write_atomically(path, buffer.getbuffer())


def plot_rewards(folders, out="runs/rewards.png", window=100):
    """Reward curves of runs, one per stage, on one picture: the mean of the last `window` games, a tick below for
    every clear, and for a single curve a dot per game."""
    curves = []  # name, rows
    for folder in map(Path, folders):
        rows = read_rows(folder)
        if not rows:
            raise UserError(f"{folder / 'episodes.csv'}: no episodes to draw")
        for stage in sorted({row["stage"] for row in rows}):
            curves.append((f"{folder.name}, {stage}", [row for row in rows if row["stage"] == stage]))
    out = checked_out(out, ".png", ".svg", ".pdf")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for k, ((name, rows), colour) in enumerate(zip(curves, COLOURS * len(curves), strict=False)):
        steps, returns, cleared = (np.array([row[key] for row in rows]) for key in ("env_steps", "return", "cleared"))
        mean = [returns[max(0, i - window):i].mean() for i in range(1, len(rows) + 1)]
        axes.plot(steps, mean, color=colour, linewidth=2, label=f"{name} ({cleared.sum()} clears)".replace("$", r"\$"))
        if len(curves) == 1:
            axes.plot(steps, returns, ".", color=colour, alpha=0.3, markersize=3)
        axes.plot(steps[cleared > 0], np.full(cleared.sum(), -150 * (k + 1)), "|", color=colour)
    axes.set(title="Reward of the training games", xlabel="environment steps",
             ylabel=f"total reward of a game, mean of the last {window}\n(a tick below: cleared)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(buffer := io.BytesIO(), format=out.suffix[1:], dpi=110)
    write_atomically(out, buffer.getbuffer())
    print(f"saved {out}")


# ===== 7. Command line. In: what was typed. Out: exit code 0, or one line on what is wrong and exit code 2.

def command(*words):
    """A command of this program that can be pasted: it names the Python that runs it."""
    files, here = (Path(sys.executable), Path(__file__).resolve()), Path.cwd()
    files = [file.relative_to(here) if file.is_relative_to(here) else file for file in files]
    return shlex.join(str(word).replace(os.sep, "/") for word in [*files, *words])


def checked_out(name, *endings):
    """The path of a file to be written; its folder is made. UserError: it cannot be meant for this."""
    path = Path(name)
    if path.suffix not in endings or path.name.lower() == "settings.json" or path.is_dir():
        raise UserError(f"--out: {path} is not a file of its own that ends in {' or '.join(endings)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def train(preset=None, out=None, **typed):
    """A new run in a new folder."""
    settings = Settings(**{**(PRESETS[preset] if preset else {}), **typed})
    free = (k for k in range(1, 10**6) if not Path("runs", f"{settings.double}-{k}").exists())
    folder = Path("runs", f"{settings.double}-{next(free)}") if out is None else Path(out)
    if out == "" or folder.suffix in (".png", ".svg", ".pdf", ".json", ".gif"):
        raise UserError(f"--out: {out!r} is not a folder for a training")
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out: {folder} is there already; {command('--resume', folder)} continues a run")
    run(settings, folder)


def resume(name, **typed):
    """An earlier run, from its last checkpoint. `typed`: other limits."""
    folder, path = Path(name), Path(name, "settings.json")
    with reading(path):
        settings = Settings(**json.loads(path.read_text()))
    run(replace(settings, **typed), folder, resume=True)


MODES = {"train": train, "resume": resume, "plot": plot_rewards, "evaluate": evaluate, "watch": watch}
FLAGS = {  # what may be typed beside the mode
    "train": {"preset", "out", *(spec.name for spec in fields(Settings))}, "resume": {"steps", "episodes"},
    "plot": {"out"}, **dict.fromkeys(("evaluate", "watch"), {"noise", "episodes", "seed", "stage", "out"})}


def build_parser():
    """The modes' flags and one for each field of Settings, which checks values."""
    parser = argparse.ArgumentParser(prog="mario_ddqn.py", usage=argparse.SUPPRESS, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS, description=__doc__.partition("\n")[0])
    what = parser.add_argument_group("what to do (without any of these: train)")
    what.add_argument("--resume", metavar="RUN", help="continue a run; only --steps and --episodes may change")
    what.add_argument("--plot", metavar="RUN", nargs="+", help="draw the reward curves of runs")
    trained = {"metavar": "RUN|FILE", "nargs": "?"}
    what.add_argument("--evaluate", **trained, help="how often does a run's network, or the one that comes with "
                      "the program for --stage, clear the level in --episodes (default: 100) with --noise?")
    what.add_argument("--watch", **trained, help="look at it play --episodes (default: 1)")
    what.add_argument("--noise", choices=NOISES, help="for --evaluate and --watch: 0 to 30 idle steps first (noop), "
                      "5%% random actions (epsilon), the last action again with probability 0.25 (sticky)")
    what.add_argument("--out", metavar="PATH", help="where to write: the folder of a training, a plot "
                      "(.png, .svg, .pdf), an evaluation (.json), a clip of --watch (.gif)")
    group = parser.add_argument_group("settings of a training")
    group.add_argument("--preset", choices=PRESETS, help="a set of settings, below those that are typed")
    for spec in fields(Settings):
        more = {"action": argparse.BooleanOptionalAction} if spec.type is bool else {"type": spec.type}
        if spec.name == "double":
            more |= {"nargs": "?", "const": "tutorial", "metavar": "|".join(RULES)}
        group.add_argument("--" + spec.name.replace("_", "-"), **more,
                           help=f"{spec.metadata['help']} (default: {spec.default})")
    return parser


def main(argv=None):
    """The program. argv: what was typed, by default the command line. Returns the exit code."""
    try:
        known, foreign = build_parser().parse_known_args(argv)
        typed = vars(known)
        mode = next((name for name in MODES if name in typed), "train")
        named = [typed.pop(mode)] if mode in typed else []  # the run or the file
        foreign += [f"--{flag.replace('_', '-')}" for flag in sorted(typed.keys() - FLAGS[mode])]
        if foreign:
            what = "a training" if mode == "train" else f"--{mode}"
            raise UserError(f"{foreign[0]} means nothing for {what}")
        MODES[mode](*named, **typed)
        return 0
    except UserError as error:
        message = str(error)
    except Timeout as error:
        message = f"{error.lock_file}: another program is training this run"
    except OSError as error:
        message = f"{error.filename or 'writing failed'}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:  # PyTorch has no MemoryError
        if "memory" not in repr(error).lower():
            raise
        message = "not enough memory: a smaller --memory or --batch or fewer --envs need less"
    except KeyboardInterrupt as stopped:  # a training that was asked to stop has saved all and names the signal
        if stopped.args:
            return 128 + stopped.args[0]
        print("mario_ddqn.py: stopped at once; a training keeps its last checkpoint", file=sys.stderr)
        return 130
    print("mario_ddqn.py: error:", *message.splitlines(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot write ε shows a ? instead
        stream.reconfigure(errors="replace")
    sys.exit(main())
