"""Steps per second: a plain loop against mario_ddqn.py, the machine's bound, and what busy programs do to it.

    python tests/benchmarks/throughput.py [--seconds 5] [--rounds 2] [--out results/throughput.json]

"plain" is the tutorial's loop as it describes it: one emulator, NumPy wrappers, two float32 stacks per transition,
plain Adam, as many PyTorch threads as cores. "same work" is mario_ddqn.py with the tutorial's settings and 8 games.
"while 1" is mario_ddqn.py --double as it comes: the games play in threads on all cores but one, and meanwhile it learns
with one PyTorch thread. Its variants give each game a thread ("each"), and learn after the games have played ("after"),
or have more PyTorch threads. Each is a process of its own that is stopped (SIGSTOP) until
its turn; its memory is full from the start (of grey frames), ε is 0.02, its floor. The bound: all cores always busy,
seconds per step = max(E + U / cores, U), E: emulation alone on all cores, U: updates alone on one thread.
It takes about 7 minutes and 9 GB of memory on 2 cores. Linux and macOS.
"""
import argparse
import itertools
import json
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
import mario_ddqn as m  # noqa: E402
from mario_ddqn import cv2, nn, np, torch  # noqa: E402

BUSY = "import os; mine = os.getppid()\nwhile os.getppid() == mine: pass"
CORES, WARM_UP, CAPACITY = os.cpu_count(), 1, 10_000  # seconds that do not count; transitions in memory of "plain"
ORDERS = {"while": "learns while the games play", "each": "the same with a thread for each game",
          "after": "learns after the games have played, a thread for each"}
VARIANTS = [f"{order} {threads}" for order in ORDERS for threads in sorted({1, 2, CORES})]
LOOPS = [("emulation", 0, 0), ("updates", 0, 0),  # name, steps per update, busy programs
         *((name, every, 0) for every in (1, 4) for name in ("plain", "same work")),
         *((name, 4, busy) for busy in (0, 1, 2) for name in VARIANTS)]
LABELS = {"plain": "plain loop", "same work": "`--preset tutorial --double`, 8 games"}


# ===== The loops. Each counts its steps with tick(steps), which returns how many steps an update is to have.

class PlainGame(m.gym.Wrapper):
    def reset(self):
        self.buffer = np.zeros((4, 84, 84), np.float32)
        return self.look([self.env.reset()[0]])

    def look(self, frames):
        red, green, blue = np.moveaxis(np.max(np.stack(frames[-2:]), axis=0).astype(np.float32), 2, 0)
        small = cv2.resize(red * 0.299 + green * 0.587 + blue * 0.114, (84, 110), interpolation=cv2.INTER_AREA)[18:102]
        self.buffer = np.concatenate([self.buffer[1:], small.astype(np.uint8)[None]])
        return self.buffer.astype(np.float32) / 255.0  # (4, 84, 84)

    def step(self, action):
        total, frames, over = 0.0, [], False
        while len(frames) < 4 and not over:
            obs, reward, terminated, truncated, _ = self.env.step(action)
            frames.append(obs.copy())
            total, over = total + reward, terminated or truncated
        return self.look(frames), total, over


def plain(tick):
    torch.set_num_threads(CORES)
    local_net, target_net = (m.DQNSolver((4, 84, 84), 5) for _ in range(2))
    optimizer = torch.optim.Adam(local_net.parameters(), lr=2.5e-4)
    states, next_states = (torch.full((CAPACITY, 4, 84, 84), 0.5) for _ in range(2))
    actions, rewards, terminals = (torch.zeros(CAPACITY, 1) for _ in range(3))
    game, steps = PlainGame(m.JoypadSpace(m.make_game("1-1"), m.RIGHT_ONLY)), 0
    state = game.reset()
    while True:  # without the copy to the target network: its time does not count beside the updates'
        train_every, explore = tick(steps), random.random() < 0.02
        with torch.no_grad():
            action = random.randrange(5) if explore else int(local_net(torch.from_numpy(state)[None]).argmax())
        next_state, reward, terminal = game.step(action)
        at = steps % CAPACITY
        states[at], next_states[at] = torch.from_numpy(state), torch.from_numpy(next_state)
        actions[at], rewards[at], terminals[at] = action, reward, float(terminal)
        state, steps = game.reset() if terminal else next_state, steps + 1
        if steps % train_every == 0:
            at = torch.tensor(random.choices(range(CAPACITY), k=32))
            with torch.no_grad():
                best = target_net(next_states[at]).max(1, keepdim=True).values
                target = rewards[at] + 0.9 * best * (1 - terminals[at])
            loss = nn.functional.smooth_l1_loss(local_net(states[at]).gather(1, actions[at].long()), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class Waiting(ThreadPoolExecutor):  # `map` returns when all games have taken their step: the agent learns after it
    def map(self, *args):
        return iter(list(super().map(*args)))


def mario(tick, name, folder):
    """run() with an agent that counts in `act`, which is the top of run()'s loop, and has a full memory."""
    same_work = m.PRESETS["tutorial"] if name == "same work" else {}
    order, threads = name.split() if name in VARIANTS else ("while", "1")
    torch.set_num_threads(int(threads))
    if order != "while":
        pool = Waiting if order == "after" else ThreadPoolExecutor
        m.ThreadPoolExecutor = lambda *_: pool(m.Settings.envs)
    m.CHECKPOINT_SECONDS = 10**9

    class Agent(m.DQNAgent):
        def act(self, states):
            if not len(self.memory):
                self.memory.frames[:], self.memory.priority[:], self.memory.written[:] = 128, 1, self.memory.size
            while name == "updates":
                tick(self.updates * self.settings.train_every)
                self.experience_replay()
            object.__setattr__(self.settings, "train_every", tick(self.steps))
            return super().act(states)

    m.DQNAgent = Agent
    always = {"double": "tutorial", "envs": 8, "eps_decay": 0.0, "episodes": 10**6, "steps": 0}
    m.run(m.Settings(**same_work | always), Path(folder, "run " + name))


def emulation(tick):
    """The games alone: as many as by default, random actions, resets included."""
    envs = [m.make_env() for _ in range(m.Settings.envs)]
    for env in envs:
        env.reset()

    def step(env):
        return env.reset() if env.step(random.randrange(5))[2] else None

    with ThreadPoolExecutor(len(envs)) as pool:
        for k in itertools.count():
            tick(k * len(list(pool.map(step, envs))))


def serve(shared, name, folder):
    """The whole life of a process. shared: steps so far, the time of that count, steps per update."""
    def tick(steps):
        shared[:2] = steps, time.monotonic()
        return int(shared[2])

    sys.stdout = sys.stderr = open(Path(folder, name + ".log"), "w", buffering=1)
    {"plain": plain, "emulation": emulation}.get(name, lambda tick: mario(tick, name, folder))(tick)


# ===== The other side: turns, table, command line

def turn(process, shared, seconds, train_every, busy):
    """Steps per second of one process, while the others are stopped."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    shared[2] = train_every
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(WARM_UP)
    before, until = shared[:2], time.monotonic() + seconds
    while process.is_alive() and (time.monotonic() < until or shared[0] == before[0]):  # one count more at least
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    for other in others:
        other.kill()
    return (shared[0] - before[0]) / (shared[1] - before[1])


def measure(seconds, rounds):
    spawn, programs, raw, load = multiprocessing.get_context("spawn"), {}, [], os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in dict.fromkeys(name for name, _, _ in LOOPS):
                shared = spawn.Array("d", [0, 0, 4], lock=False)
                process = spawn.Process(target=serve, args=(shared, name, folder), daemon=True)
                programs[name] = process, shared
                process.start()
                while not shared[1]:  # until it plays
                    if not process.is_alive():
                        sys.exit(f"{name} stopped:\n{Path(folder, name + '.log').read_text()}")
                    time.sleep(0.01)
                os.kill(process.pid, signal.SIGSTOP)
            for _ in m.tqdm(range(rounds), unit="round"):
                raw.append([turn(*programs[name], seconds, every, busy) for name, every, busy in LOOPS])
        finally:
            for process, _ in programs.values():
                process.kill()
                process.join()
    return {"cores": CORES, "system": platform.system(), "python": platform.python_version(),
            "torch": torch.__version__, "bf16": m.DQNAgent(m.Settings()).bf16, "load": load,
            "seconds": seconds, "loops": LOOPS, "steps_per_second": raw}


def table(result):
    """What results/throughput.json says, as README shows it."""
    loops, rounds = [tuple(loop) for loop in result["loops"]], np.array(result["steps_per_second"])
    speeds = dict(zip(loops, rounds.T, strict=True))
    lines = [f"{result['cores']} cores, bfloat16 {'yes' if result['bf16'] else 'no'}, Python {result['python']}, torch "
             f"{result['torch']}. Steps per second, medians of {len(rounds)} rounds of {result['seconds']:g} s.", "",
             "| loop | steps per update | times plain | quiet | 1 busy program | 2 |", "| --- " * 6 + "|"]
    for name, every in dict.fromkeys(loop[:2] for loop in loops[2:]):
        found = [speeds.get((name, every, busy)) for busy in (0, 1, 2)]
        cells = ["" if one is None else f"{median(one):.0f}" for one in found]
        order, _, threads = name.partition(" ")
        label = LABELS.get(name) or f"`--double`, {ORDERS[order]}, PyTorch threads: {threads}"
        times = median(found[0] / speeds["plain", every, 0])
        lines.append(f"| {label} | {every} | {times:.2f} | {' | '.join(cells)} |")
    ours, (games, updates) = speeds["while 1", 4, 0], (1 / speeds[name, 0, 0] for name in ("emulation", "updates"))
    bound = 1 / np.maximum(games + updates / result["cores"], updates)
    return "\n".join([*lines, "", (
        f"Emulation alone makes {median(1 / games):.0f} steps/s on all cores; updates alone suffice for "
        f"{median(1 / updates):.0f} steps/s on one thread. So the bound is {median(bound):.0f} steps/s, and the loop "
        f"as it comes (while, 1 thread) reaches {median(ours / bound):.0%} of it.")])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="length of a turn (default: 5)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each loop (default: 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "throughput.json", help="the JSON to write")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are ended, too
    result = measure(args.seconds, args.rounds)
    m.write_atomically(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(table(result))


if __name__ == "__main__":
    main()
