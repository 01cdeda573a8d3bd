"""What does one random action do to the trained network: where does it kill, and does the network know?

    python tests/benchmarks/slips.py            plays (some 20 minutes of one core), then the figure and the sentences
    python tests/benchmarks/slips.py --draw     only the figure (slips.png) and the sentences, from slips.json

The map: along greedy games, after a few different idle starts, every other action is tried in every step, once each,
with greedy play after it. Who is not dead 20 steps later has survived. The lost games: those of `--evaluate --noise
epsilon`. Of each, the last random action without which greedy play lives on, and then, from right after it, 48 other
ways to go on (greedy play with held random actions thrown in for 25 steps): does any survive?

nes-py keeps one state of a game (a backup), exactly: tests/test_generations.py has a test of that.
"""
import argparse
import copy
import json
import os
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
import mario_ddqn  # noqa: E402

RESULTS = ROOT / "results"
IDLE = (0, 10, 20, 30)
WAIT, WAYS = 20, 48


class Saved:
    """A game as it stands, to come back to: the emulator's one backup and what the wrappers around it remember."""

    PLAIN = (int, float, np.generic, np.ndarray, deque, list)

    def __init__(self, env):
        self.layers = []
        while True:
            own = {name: value for name, value in vars(env).items()
                   if isinstance(value, self.PLAIN) and name not in ("screen", "ram", "controllers")}  # views of C++
            self.layers.append((env, copy.deepcopy(own)))
            if not hasattr(env, "env"):
                break
            env = env.env
        env.unwrapped._backup()

    def restore(self):
        self.layers[-1][0].unwrapped._restore()
        for env, own in self.layers:
            vars(env).update(copy.deepcopy(own))


class Player:
    """One network's greedy choice, state by state, and what comes of going on with some other choice."""

    def __init__(self, network):
        torch.set_num_threads(1)
        _, self.q_values, self.settings = mario_ddqn.find_network(network)

    def game(self):
        env = mario_ddqn.make_env(self.settings["stage"], self.settings["show_jump"] == "yes")
        return env, env.reset()[0]

    def points(self, state):
        return self.q_values(state[None])[0] / self.settings["reward_scale"]  # (5,)

    def greedy(self, state):
        return int(self.points(state).argmax())

    def lives(self, env, state, choose, steps):
        """Is it still alive, or has it cleared the level, after so many steps?"""
        for _ in range(steps):
            state, _, terminated, truncated, info = env.step(choose(state))
            if terminated or truncated:
                return bool(info["flag_get"])
        return True

    def wanderer(self, rng):
        """Greedy play, but for 25 steps random actions begin now and then and are held for up to 6 steps."""
        held = {"action": 0, "left": 0, "step": 0}

        def choose(state):
            held["step"] += 1
            if held["left"] == 0 and held["step"] <= 25 and rng.random() < 0.3:
                held.update(action=int(rng.integers(5)), left=int(rng.integers(1, 7)))
            if held["left"] == 0:
                return self.greedy(state)
            held["left"] -= 1
            return held["action"]
        return choose


def slip_first(action, choose):
    """`action` once, then whatever `choose` says."""
    waiting = [action]
    return lambda state: waiting.pop() if waiting else choose(state)


def map_of(network, idle):
    """One greedy game: a dict per step with x, the Q-values in points, the choice, and which other actions kill."""
    player, steps = Player(network), []
    env, state = player.game()
    for _ in range(idle):
        state = env.step(0)[0]
    info, over = {"x_pos": 40}, False  # where Mario stands at the start
    while not over and len(steps) < 1000:
        points, here, kills = player.points(state), Saved(env), []
        choice = int(points.argmax())
        for action in set(range(5)) - {choice}:
            alive = player.lives(env, state, slip_first(action, player.greedy), WAIT + 1)
            kills += [] if alive else [action]
            here.restore()
        steps.append({"x": int(info["x_pos"]), "q": [round(float(q), 1) for q in points], "choice": choice,
                      "kills": kills})
        state, _, terminated, truncated, info = env.step(choice)
        over = terminated or truncated
    env.close()
    return {"idle": idle, "cleared": bool(info["flag_get"]), "steps": steps}


def autopsy(network, number):
    """Episode `number` of --evaluate --noise epsilon: None if it does not end in a death, or what led to it."""
    player = Player(network)
    track = mario_ddqn.Episode(np.random.default_rng([0, 4, number]), "epsilon")
    env, state = player.game()
    chosen, played, over = [], [], False
    while not over and len(played) < 1000:
        chosen.append(player.greedy(state))
        played.append(track.disturb(chosen[-1]))
        state, _, over, _, info = env.step(played[-1])
    env.close()
    if info["flag_get"] or not over:
        return None
    found = {"episode": number, "x": int(info["x_pos"])}
    for at in [k for k in range(len(played)) if chosen[k] != played[k] and len(played) - k <= 60][::-1]:
        env, state = player.game()
        for action in played[:at]:
            state = env.step(action)[0]
        horizon, here = len(played) - at + 15, Saved(env)
        if player.lives(env, state, player.greedy, horizon):  # without this one it would have lived on
            here.restore()
            state, _, over, _, _ = env.step(played[at])
            found.update(steps_before=len(played) - at, chosen=chosen[at], played=played[at], ways_out=0)
            if not over:
                here = Saved(env)
                for way in range(WAYS):
                    here.restore()
                    choose = player.wanderer(np.random.default_rng([number, way]))
                    found["ways_out"] += player.lives(env, state, choose, horizon)
            env.close()
            break
        env.close()
    return found


def measure(network, episodes, workers):
    with ProcessPoolExecutor(workers) as pool:
        maps = [pool.submit(map_of, network, idle) for idle in IDLE]
        lost = [pool.submit(autopsy, network, number) for number in range(episodes)]
        return {"network": Path(network).name, "episodes": episodes, "ways_tried": WAYS,
                "maps": [job.result() for job in maps], "lost": [job.result() for job in lost if job.result()]}


def gaps(game, kills):
    """How many points less than its choice the network gives the actions that kill (or that do not)."""
    return [(step["x"], max(step["q"]) - step["q"][action]) for step in game["steps"] for action in range(5)
            if action != step["choice"] and (action in step["kills"]) == kills]


def sentences(found):
    """What README says of it. Costs of a place: the sum over its deadly actions of probability × points lost."""
    maps, lost = found["maps"], found["lost"]
    one = [game for game in lost if "ways_out" in game]
    hopeless = [game for game in one if not game["ways_out"]]
    released = [game for game in one if game["chosen"] in (2, 4) and game["played"] not in (2, 4)]
    dangerous = fmean(sum(bool(step["kills"]) for step in game["steps"]) for game in maps)
    length = fmean(len(game["steps"]) for game in maps)
    deaths = fmean(sum(0.05 * len(step["kills"]) / 5 for step in game["steps"]) for game in maps)
    knows, others = (fmean(gap for game in maps for _, gap in gaps(game, kills)) for kills in (True, False))
    cost = fmean(0.05 / 5 * sum(max(step["q"]) - step["q"][action] for action in step["kills"])
                 for game in maps for step in game["steps"] if step["kills"])
    return (
        f"Of {found['episodes']} games with random actions the network of the picture loses {len(lost)} by a death. In "
        f"{len(one)} of these one random action decides: without it, greedy play lives on. And after it, it is mostly "
        f"too late: in {len(hopeless)} of the {len(one)}, none of {found['ways_tried']} other ways to go on from there "
        f"survives. In {len(released)} that action let go of the jump button. On the way through the level, in turn, "
        f"there are {dangerous:.0f} such places among {length:.0f} steps (mean of {len(maps)} greedy games), where at "
        f"least one other action kills; all together they make {deaths:.2f} deaths a game.\n\n"
        f"The network tells them apart: it gives the actions that kill {knows:.0f} points less than its choice, and "
        f"the others {others:.0f}. But by its own reckoning it hardly pays to keep away from such a place: random "
        f"actions there cost {cost:.1f} points on average, and each step of the way brings about 10.")


def draw(found):
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    for kills, colour, label in ((False, "#999999", "one such action: it lives on"), (True, "#D55E00", "it dies")):
        x, points = zip(*(pair for game in found["maps"] for pair in gaps(game, kills)), strict=True)
        axes.plot(x, points, ".", color=colour, markersize=7 if kills else 3, label=label)
    axes.set(xlabel="x, pixels", ylabel="Q(choice) − Q(action), points")
    axes.legend(loc="upper left", fontsize=9)
    axes.grid(alpha=0.3)
    mario_ddqn.write_atomically(RESULTS / "slips.png", lambda file: figure.savefig(file, format="png", dpi=110))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="play nothing, only draw")
    parser.add_argument("--network", default=str(mario_ddqn.TRAINED), help="a run or a file (default: the trained one)")
    parser.add_argument("--episodes", type=int, default=100, help="games with random actions (default: 100)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--out", type=Path, default=RESULTS / "slips.json")
    args = parser.parse_args()
    if not args.draw:
        mario_ddqn.write_json(args.out, measure(args.network, args.episodes, args.workers))
    found = json.loads(args.out.read_text())
    if args.out == RESULTS / "slips.json":
        draw(found)
    print(sentences(found))


if __name__ == "__main__":
    main()
