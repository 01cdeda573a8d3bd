"""Steps per second, peak memory and the machine's bound: a plain loop against mario_ddqn.py.

    python tests/benchmarks/throughput.py [--seconds 8] [--rounds 5] [--out results/throughput.json]
    python tests/benchmarks/throughput.py --markdown [--from results/throughput.json]     prints the table once more

(a) is the tutorial's loop as it describes it, written out below: one emulator, NumPy wrappers, two float32 stacks
per transition, plain Adam. (b) is mario_ddqn.py with the tutorial's settings: the same work, but as many games side
by side as by default. (c) is mario_ddqn.py --double as it comes. (b) and (c) are `run()` itself, without exams and
checkpoints. Everywhere ε is 0.02, its floor, so that nearly every action costs a forward pass, and the memory is
filled to its last place with real play before the clock starts: start-up and fill-up do not count, learning does.

Each program is a process of its own (so peak memory is its own) and sleeps until its turn. A round gives each loop
--seconds, one after the other; ratios are made within a round, because a machine's speed drifts. The bound,

    seconds per step = emulation alone, on all cores + acting alone + an update alone / steps per update,

is made of the program's own parts, measured in the same round; (a) is held against emulation on all cores, too.
Everything runs on the CPU, in float32 where the table does not say otherwise. Linux and macOS; about 9 GB of memory.
"""
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from statistics import median

if multiprocessing.current_process().name in ("emulation", "b32", "bauto", "c"):
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import mario_ddqn  # before torch: it sets how torch's threads wait; only in the processes that are to run it

import cv2
import numpy as np
import torch
from torch import nn

if sys.version_info < (3, 13):  # as in mario_ddqn.py: two generations of packages
    with contextlib.redirect_stderr(io.StringIO()):  # gym greets with a notice
        import gym
    gym.logger.set_level(gym.logger.ERROR)
    MAKE = {"apply_api_compatibility": True, "disable_env_checker": True}
else:
    import gymnasium as gym
    MAKE = {"disable_env_checker": True}
import gym_super_mario_bros  # noqa: F401 - registers the game
from gym_super_mario_bros.actions import RIGHT_ONLY
from nes_py.wrappers import JoypadSpace

SAVED, CPUINFO = Path(__file__).resolve().parents[2] / "results" / "throughput.json", "/proc/cpuinfo"
EPSILON, WARM_UP = 0.02, 0.5  # WARM_UP: seconds at the start of each turn that do not count
SAME_WORK = ["--preset", "tutorial", "--double", "--precision"]
PROGRAMS = {"plain": None, "b32": [*SAME_WORK, "float32"], "bauto": [*SAME_WORK, "auto"], "c": ["--double"]}
LOOPS = [  # program, environment steps per update (0: its own), name in the table
    ("plain", 1, "(a) plain loop"), ("b32", 1, "(b) mario_ddqn.py, same work, float32"),
    ("bauto", 1, "(b) mario_ddqn.py, same work, auto"), ("plain", 4, "(a) plain loop"),
    ("b32", 4, "(b) mario_ddqn.py, same work, float32"), ("bauto", 4, "(b) mario_ddqn.py, same work, auto"),
    ("c", 0, "(c) mario_ddqn.py --double, auto")]


# ===== (a) The plain loop

class PlainMaxAndSkip(gym.Wrapper):
    def step(self, action):
        total, frames = 0.0, deque(maxlen=2)
        for _ in range(4):
            obs, reward, terminated, truncated, info = self.env.step(action)
            frames.append(obs.copy())
            total += reward
            if terminated or truncated:
                break
        return np.max(np.stack(frames), axis=0), total, terminated, truncated, info


class PlainFrames(gym.ObservationWrapper):
    def reset(self, **kwargs):
        self.buffer = np.zeros((4, 84, 84), np.float32)
        return super().reset(**kwargs)

    def observation(self, obs):
        image = obs.astype(np.float32)
        grey = image[:, :, 0] * 0.299 + image[:, :, 1] * 0.587 + image[:, :, 2] * 0.114
        small = cv2.resize(grey, (84, 110), interpolation=cv2.INTER_AREA)[18:102]
        self.buffer = np.concatenate([self.buffer[1:], small.astype(np.uint8)[None]])
        return self.buffer.astype(np.float32) / 255.0  # (4, 84, 84)


def plain_env():
    env = gym.make("SuperMarioBros-1-1-v0", **MAKE)
    return JoypadSpace(PlainFrames(PlainMaxAndSkip(env)), RIGHT_ONLY)


class PlainAgent:
    def __init__(self, capacity):
        self.local_net, self.target_net = (nn.Sequential(
            nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 5)) for _ in range(2))
        self.optimizer = torch.optim.Adam(self.local_net.parameters(), lr=2.5e-4)
        self.states, self.next_states = torch.zeros(capacity, 4, 84, 84), torch.zeros(capacity, 4, 84, 84)
        self.actions, self.rewards, self.terminals = (torch.zeros(capacity, 1) for _ in range(3))
        self.capacity, self.written, self.updates = capacity, 0, 0

    def act(self, state):
        if random.random() < EPSILON:
            return random.randrange(5)
        with torch.no_grad():
            return int(self.local_net(torch.from_numpy(state)[None]).argmax())

    def remember(self, state, action, reward, next_state, terminal):
        at = self.written % self.capacity
        self.states[at], self.next_states[at] = torch.from_numpy(state), torch.from_numpy(next_state)
        self.actions[at], self.rewards[at], self.terminals[at] = action, reward, float(terminal)
        self.written += 1

    def experience_replay(self):
        if self.updates % 5000 == 0:
            self.target_net.load_state_dict(self.local_net.state_dict())
        at = torch.tensor(random.choices(range(min(self.written, self.capacity)), k=32))
        with torch.no_grad():
            best = self.target_net(self.next_states[at]).max(1, keepdim=True).values
            target = self.rewards[at] + 0.9 * best * (1 - self.terminals[at])
        q_values = self.local_net(self.states[at]).gather(1, self.actions[at].long())
        loss = nn.functional.smooth_l1_loss(q_values, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.updates += 1


def plain(name, turns, args, folder):
    torch.set_num_threads(args.threads or torch.get_num_threads())
    random.seed(0)
    torch.manual_seed(0)
    env, agent, played, steps = plain_env(), PlainAgent(args.memory), record(plain_env()), 0
    for i in range(args.memory):
        agent.remember(*played(i))
    held = sum(t.nbytes for t in (agent.states, agent.next_states, agent.actions, agent.rewards, agent.terminals))
    state, _ = env.reset()
    turns.alone = {"act": lambda: [agent.act(state)], "update": lambda: [agent.experience_replay()]}
    turns.answer(bytes_per_transition=held / args.memory)
    while True:
        train_every = turns.gate(steps, agent.updates)
        action = agent.act(state)
        next_state, reward, terminated, truncated, _ = env.step(action)
        agent.remember(state, action, reward, next_state, terminated)
        state = env.reset()[0] if terminated or truncated else next_state
        steps += 1
        if steps % train_every == 0:
            agent.experience_replay()


# ===== (b) and (c): mario_ddqn.py

def mario(name, turns, args, folder):
    """run() as it is, with an agent that fills its memory first and that between two turns stops in `act`, which is
    the top of run()'s loop. Or the games alone: as many as by default, random actions, resets included."""
    defaults = mario_ddqn.parse_args([]).settings
    if name == "emulation":
        games, rng = mario_ddqn.Emulators(defaults.envs), np.random.default_rng(0)
        for e in range(defaults.envs):
            games.reset(e)
        turns.alone = {"emulation": lambda: [games.reset(e) if result[2] or result[3] else None for e, result in
                                             enumerate(games.step(rng.integers(5, size=defaults.envs)))]}
        turns.answer()
        turns.gate(0, 0)
    settings = mario_ddqn.parse_args([*PROGRAMS[name], "--threads", str(args.threads)]).settings
    vars(settings).update(envs=defaults.envs, eps_start=EPSILON, eps_min=EPSILON, eval_every=0, episodes=10**9,
                          steps=0, minutes=0, until_clear=0, checkpoint_minutes=1e6, device="cpu")
    settings.memory = defaults.memory if name == "c" else args.memory
    act = mario_ddqn.DQNAgent.act

    class Agent(mario_ddqn.DQNAgent):
        steps = 0

        def act(self, states):
            if not self.steps:
                self.fill(states)
            settings.train_every = turns.gate(self.steps, self.updates) or settings.train_every
            self.steps += len(states)
            return act(self, states)

        def fill(self, states):
            played, share = record(mario_ddqn.make_env()), settings.memory // len(states)
            for e in range(len(states)):
                for i in range(share):
                    self.remember(*played(i), truncated=i == share - 1, env=e)
                    if e == 0 and i == 399:  # not full yet: the places taken by 400 transitions
                        held = self.memory.nbytes / settings.memory * len(self.memory) / 400
            turns.alone = {"act": lambda: act(self, states), "update": lambda: [self.experience_replay()]}
            turns.answer(bytes_per_transition=held, train_every=settings.train_every,
                         bf16=mario_ddqn.choose_device("cpu", "auto")[1])

    mario_ddqn.DQNAgent = Agent
    (run_folder := Path(folder, name)).mkdir()
    mario_ddqn.run(settings, run_folder)


# ===== A program's side of the measurement: real play to fill its memory with, and its turns

def record(env, length=400):
    """Real play with random actions: played(i) is transition i, again and again. As bytes: peak memory counts."""
    rng, transitions, state, terminated = np.random.default_rng(0), [], env.reset()[0], False
    while len(transitions) < length or not terminated:
        state = env.reset()[0] if terminated else state
        next_state, reward, terminated, _, _ = env.step(action := int(rng.integers(5)))
        transitions.append((np.rint(state * 255).astype(np.uint8), action, reward,
                            np.rint(next_state * 255).astype(np.uint8), terminated))
        state = next_state
    env.close()

    def played(i):
        state, action, reward, next_state, terminated = transitions[i % len(transitions)]
        return state / np.float32(255), action, reward, next_state / np.float32(255), terminated
    return played


class Turns:
    """A program's end of the pipe. An order is (what, seconds, steps per update), the answer seconds and counts."""

    def __init__(self, pipe):
        self.pipe, self.order, self.alone = pipe, None, {}

    def answer(self, **content):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.pipe.send({**content, "peak_bytes": peak})

    def gate(self, steps, updates):
        """A loop comes here at the top of every iteration, with its totals so far, and goes on when it may.
        Returns its steps per update."""
        now = time.perf_counter()
        if self.order and now < self.warm:
            self.begin = now, steps, updates
        if self.order and now < self.begin[0] + self.order[1]:
            return self.order[2]
        if self.order:
            self.answer(seconds=now - self.begin[0], steps=steps - self.begin[1], updates=updates - self.begin[2])
        while True:
            try:
                what, seconds, train_every = order = self.pipe.recv()
            except EOFError:  # that was the last turn
                raise SystemExit from None
            if what == "loop":
                self.order, self.begin = order, (time.perf_counter(), steps, updates)
                self.warm = self.begin[0] + WARM_UP
                return train_every
            for limit in (WARM_UP, seconds):
                begin, count = time.perf_counter(), 0
                while (now := time.perf_counter()) < begin + limit:
                    count += len(self.alone[what]())
            self.answer(seconds=now - begin, count=count)


def serve(pipe, args, folder):
    """The whole life of a program's process."""
    name = multiprocessing.current_process().name
    sys.stdout = sys.stderr = open(Path(folder, name + ".log"), "w", buffering=1)
    (plain if name == "plain" else mario)(name, Turns(pipe), args, folder)


# ===== The other end: turns, figures, table, command line

class UserError(Exception):
    """Something the user can mend, in one line."""


def measure(args):
    cpu = re.search(r"model name\s*: (.+)", Path(CPUINFO).read_text()) if os.path.exists(CPUINFO) else None
    machine = {"cpu": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count(), "system": platform.platform(),
               "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
               "threads": args.threads or torch.get_num_threads(), "load_before": os.getloadavg(),
               "environment": {name: value for name, value in os.environ.items()
                               if name.startswith(("OMP_", "GOMP_", "MKL_"))}}
    spawn, pipes, processes, ready, raw = multiprocessing.get_context("spawn"), {}, [], {}, []

    def tell(name, *order):
        try:
            if order:
                pipes[name].send(order)
            return pipes[name].recv()
        except (EOFError, OSError):
            last = [line for line in Path(folder, name + ".log").read_text().splitlines() if line.strip()][-1:]
            raise UserError(f"{name} stopped: {' '.join(last)}") from None

    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in ("emulation", *PROGRAMS):  # one after the other: filling a memory would disturb a neighbour
                print(f"starting {name}", file=sys.stderr)
                pipes[name], theirs = spawn.Pipe()
                processes.append(spawn.Process(target=serve, name=name, args=(theirs, args, folder), daemon=True))
                processes[-1].start()
                theirs.close()
                ready[name] = tell(name)
            for k in range(args.rounds):
                print(f"round {k + 1} of {args.rounds}", file=sys.stderr)
                parts = ["emulation emulation"] + [f"{name} {what}" for name in PROGRAMS for what in ("act", "update")]
                raw.append({"alone": {part: tell(*part.split(), args.seconds / 4, 0) for part in parts},
                            "loops": [tell(name, "loop", args.seconds, every) for name, every, _ in LOOPS]})
        finally:
            for pipe in pipes.values():
                pipe.close()
            for process in processes:
                process.join(10)
                process.kill()
    machine.update(bf16=ready["bauto"]["bf16"], load_after=os.getloadavg())
    return {"machine": machine, "seconds": args.seconds, "rounds": args.rounds, "epsilon": EPSILON,
            "memory": args.memory, "programs": ready, "raw": raw,
            "loops": [summary(k, raw, ready) for k in range(len(LOOPS))]}


def summary(k, raw, ready):
    """What the rounds say about loop k: median, lowest and highest."""
    name, train_every, label = LOOPS[k]
    train_every = train_every or ready[name]["train_every"]
    other = next((i for i, loop in enumerate(LOOPS) if loop[:2] == ("plain", train_every)), 0)
    speeds, plain_speeds = ([one["loops"][i]["steps"] / one["loops"][i]["seconds"] for one in raw] for i in (k, other))
    emulation, act, update = ([one["alone"][part]["seconds"] / one["alone"][part]["count"] for one in raw]
                              for part in ("emulation emulation", f"{name} act", f"{name} update"))
    bounds = [1 / (e + a + u / train_every) for e, a, u in zip(emulation, act, update, strict=True)]
    figures = {"steps_per_second": speeds, "bound_steps_per_second": bounds,
               "times_plain": [mine / plain for mine, plain in zip(speeds, plain_speeds, strict=True)],
               "share_of_bound": [mine / bound for mine, bound in zip(speeds, bounds, strict=True)]}
    turns = [one["loops"][k] for one in raw]
    return {"label": label, "train_every": train_every, "bytes_per_transition": ready[name]["bytes_per_transition"],
            "peak_bytes": max(turn["peak_bytes"] for turn in turns), "steps": sum(turn["steps"] for turn in turns),
            "updates": sum(turn["updates"] for turn in turns),
            **{what: {"median": median(each), "min": min(each), "max": max(each)} for what, each in figures.items()}}


def table(result):
    machine = result["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores, bfloat16 {'yes' if machine['bf16'] else 'no'}, Python "
             f"{machine['python']}, torch {machine['torch']} with {machine['threads']} threads. {result['rounds']} "
             f"rounds of {result['seconds']:g} s: median (lowest to highest).", "",
             "| loop | steps per update | steps/s | times the plain loop | bound, steps/s | of the bound | peak memory "
             "| replay, bytes per transition |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for loop in result["loops"]:
        speed, times = loop["steps_per_second"], loop["times_plain"]
        lines.append(f"| {loop['label']} | {loop['train_every']} | {speed['median']:.0f} ({speed['min']:.0f} to "
                     f"{speed['max']:.0f}) | {times['median']:.2f} ({times['min']:.2f} to {times['max']:.2f}) | "
                     f"{loop['bound_steps_per_second']['median']:.0f} | {loop['share_of_bound']['median']:.0%} | "
                     f"{loop['peak_bytes'] / 1e9:.2f} GB | {loop['bytes_per_transition']:,.0f} |")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def parse_args(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=8, help="length of a turn (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loop (default: 5)")
    parser.add_argument("--threads", type=int, default=0, help="threads of PyTorch; 0: its own choice (default)")
    parser.add_argument("--memory", type=int, default=30_000, help="transitions, (a) and (b) only (default: 30000)")
    parser.add_argument("--out", type=Path, default=SAVED, help="the JSON to write (default: results/throughput.json)")
    parser.add_argument("--markdown", action="store_true", help="measure nothing, print the table in --from")
    parser.add_argument("--from", dest="saved", type=Path, default=SAVED, help="(default: results/throughput.json)")
    args = parser.parse_args(argv)
    for name, low, high in (("seconds", 0.1, 600), ("rounds", 1, 100), ("threads", 0, 256), ("memory", 8_000, 10**6)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name}: {getattr(args, name)} is not from {low} to {high}")
    if not args.markdown and not args.out.parent.is_dir():
        raise UserError(f"--out: there is no folder {args.out.parent}")
    return args


def main(argv=None):
    try:
        args = parse_args(argv)
        if not args.markdown:
            result, unfinished = measure(args), args.out.with_name("partial-" + args.out.name)
            unfinished.write_text(json.dumps(result, indent=1) + "\n")
            os.replace(unfinished, args.out)
        saved = args.saved if args.markdown else args.out
        try:
            print(table(json.loads(saved.read_text())))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"--from: {saved} was not written by this program") from None
        return 0
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}"
    except KeyboardInterrupt:
        return 130
    print(f"throughput.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
