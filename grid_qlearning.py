"""Tabular Q-learning on a 3x3 grid: the idea behind the Mario agent, small enough to read whole.

Three learners share one update and one training loop; the lines that differ are marked "changed":
  Agent         Q-learning (Watkins 1989; Sutton & Barto 2018, section 6.5)
  AgentDoubleQ  the tutorial's double rule: a second table, copied now and then (Mnih et al. 2015)
  AgentHasselt  double Q-learning as the field means it (van Hasselt 2010; Sutton & Barto, 6.7)

Run it:  python grid_qlearning.py [--double [tutorial|hasselt]]      (a second or two)
         python grid_qlearning.py --compare                          (all three, a minute at most)
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if not (3, 10) <= sys.version_info < (3, 15):
    print(f"grid_qlearning.py: this is Python {sys.version.split()[0]}; it needs Python 3.10 to 3.14", file=sys.stderr)
    raise SystemExit(2)

import numpy as np
from matplotlib.figure import Figure  # not pyplot: needs no display, changes no backend

# --- Settings: nothing enters; the defaults of everything below leave. ---------------------------
# All tables start at zero. No reward is above 0, so zero is optimistic: a move never tried looks
# at least as good as any other, and so the agent explores even where it acts greedily.
ALPHA = 0.1  # learning rate. Nothing here is random, so 1.0 would do; 0.1 also averages out noise
GAMMA = 0.9  # discount, the tutorial's for Mario. Any value above 0 gives the same best path here
EPSILON = 0.1  # share of random moves. With 0.0 all three find the best path, but Hasselt's values
# stay wrong: each of its tables must try a bad move itself before the other one can trust it
COPY_STEPS = 100  # steps between copies, about 45 episodes of the trained agent
EPISODES = 2000
MAX_STEPS = 100  # a cap for safety: in 300 runs (seeds 0 to 99) the longest episode took 75 steps
PLOTTED = 1000  # the reward curve shows the first 1,000 episodes; the rest looks like its end
WINDOW = 50  # episodes in the rolling average
FEW_VISITS = 200  # a square seen less often gets a faded arrow. In those 300 runs 305 of the 1,800
# faded arrows were wrong, and none of the other 600

# --- Grid: a state and an action enter; the next state, the reward and terminal leave. -----------
SIZE = 3
N_STATES = SIZE * SIZE  # state = 3 * row + column; row 0 is the top row
# (8, 2): rows down, columns to the right
MOVES = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
ARROWS = "↑↗→↘↓↙←↖"  # the same eight, in the same order
N_ACTIONS = len(MOVES)
BEST_RETURN = -1  # diagonal (-1), diagonal (0)


class Grid:
    """3x3 squares, start bottom left, end top right, eight moves (one for each of `ARROWS`).

    A state is an int from 0 to 8, an action an int from 0 to 7. The grid keeps no state of its
    own. For other rewards, noisy ones for instance, subclass it and override `reward`.
    """

    start = 6
    end = 2

    def step(self, state, action):
        """Return (next_state: int, reward: float, terminal: bool). IndexError: no such action."""
        row, col = divmod(state, SIZE)
        row_move, col_move = MOVES[action]
        row, col = row + row_move, col + col_move
        inside = 0 <= row < SIZE and 0 <= col < SIZE
        next_state = SIZE * row + col if inside else state  # a move off the grid leaves you there
        return next_state, self.reward(next_state), next_state == self.end

    def reward(self, next_state):
        """Return 0.0 for landing on the end square and -1.0 for any other (a bump costs too)."""
        return 0.0 if next_state == self.end else -1.0


# --- Agents: settings and a random generator enter; a table of action values leaves. -------------
class Agent:
    """Q-learning (Watkins 1989; Sutton & Barto 2018, section 6.5).

    rng: np.random.Generator, the only source of chance. alpha: learning rate in (0, 1]. gamma:
    discount in [0, 1]. epsilon: share of random moves in [0, 1]. Otherwise ValueError.
    q_table: (9, 8) float64, in units of reward.
    """

    title = "Q-learning"

    def __init__(self, rng, alpha=ALPHA, gamma=GAMMA, epsilon=EPSILON):
        if not (0 < alpha <= 1 and 0 <= gamma <= 1 and 0 <= epsilon <= 1):
            raise ValueError("need alpha in (0, 1], gamma in [0, 1] and epsilon in [0, 1]")
        self.rng, self.alpha, self.gamma, self.epsilon = rng, alpha, gamma, epsilon
        self.q_table = np.zeros((N_STATES, N_ACTIONS))  # (9, 8) float64

    def action_values(self, state=slice(None)):
        """Return what the agent acts on: (8,) float64, or the whole (9, 8) without a state."""
        return self.q_table[state]

    def act(self, state):
        """Return an action: random with probability epsilon, else greedy, a tie drawn by lot."""
        if self.rng.random() < self.epsilon:
            return int(self.rng.random() * N_ACTIONS)
        values = self.action_values(state).tolist()  # for 8 numbers a list is faster than an array
        best = max(values)
        ties = [action for action, value in enumerate(values) if value == best]
        return ties[int(self.rng.random() * len(ties))]

    def td_target(self, reward, next_state):
        """Return the target (float) of a step that did not end the episode."""
        # target = r + gamma max_a' Q(s', a')
        return reward + self.gamma * self.q_table[next_state].max()

    def q_update(self, state, action, reward, next_state, terminal):
        """Learn from one step. terminal: the episode really ended, so no future is left to add."""
        # target = r, if s' is terminal
        td_target = reward if terminal else self.td_target(reward, next_state)
        # Q(s, a) <- Q(s, a) + alpha (target - Q(s, a))
        td_error = td_target - self.q_table[state, action]
        self.q_table[state, action] += self.alpha * td_error

    def best_policy(self):
        """Return the greedy action of each square, (9,) int64; a tie goes to the lowest number.

        The end square's entry means nothing. Nor does that of a square the agent hardly visited.
        """
        return self.action_values().argmax(axis=1)  # (9, 8) -> (9,)


class AgentDoubleQ(Agent):
    """The tutorial's double Q-learning: a target network (Mnih et al. 2015) in the form of a table.

    q_target: (9, 8) float64, an older copy of q_table, refreshed every copy_steps updates.
    copy_steps: at least 1, otherwise ValueError.
    """

    title = "Double Q-learning, tutorial's rule"

    def __init__(self, rng, alpha=ALPHA, gamma=GAMMA, epsilon=EPSILON, copy_steps=COPY_STEPS):
        super().__init__(rng, alpha, gamma, epsilon)
        if copy_steps < 1:
            raise ValueError("need copy_steps of at least 1")
        self.copy_steps, self.steps = copy_steps, 0
        self.q_target = self.q_table.copy()  # (9, 8) float64

    def td_target(self, reward, next_state):
        # target = r + gamma max_a' Q_target(s', a')
        return reward + self.gamma * self.q_target[next_state].max()  # <- changed: the older copy

    def q_update(self, state, action, reward, next_state, terminal):
        super().q_update(state, action, reward, next_state, terminal)
        self.steps += 1
        if self.steps % self.copy_steps == 0:
            self.q_target = self.q_table.copy()  # <- changed: refreshed every copy_steps steps


class AgentHasselt(Agent):
    """Double Q-learning (van Hasselt 2010, algorithm 1; Sutton & Barto 2018, section 6.7).

    Two tables of equal standing, (9, 8) float64. At each update a fair coin decides which is called
    q_table (it learns, and picks the next action) and which q_other (it values that action).
    The agent acts on their mean.
    """

    title = "Double Q-learning, van Hasselt's rule"

    def __init__(self, rng, alpha=ALPHA, gamma=GAMMA, epsilon=EPSILON):
        super().__init__(rng, alpha, gamma, epsilon)
        self.q_other = self.q_table.copy()  # (9, 8) float64

    def action_values(self, state=slice(None)):
        return (self.q_table[state] + self.q_other[state]) / 2  # <- changed: act on both tables

    def td_target(self, reward, next_state):
        # target = r + gamma Q_other(s', argmax_a' Q(s', a'))
        best_action = self.q_table[next_state].argmax()  # <- changed: one table picks the action
        return reward + self.gamma * self.q_other[next_state, best_action]  # <- the other values it

    def q_update(self, state, action, reward, next_state, terminal):
        if self.rng.random() < 0.5:
            self.q_table, self.q_other = self.q_other, self.q_table  # <- changed: swap the roles
        super().q_update(state, action, reward, next_state, terminal)


# --- Training loop: an agent and a grid enter; the agent trained, returns and visits leave. ------
def run_episodes(agent, grid, episodes=EPISODES, max_steps=MAX_STEPS):
    """Train any of the agents. Return (returns, visits). ValueError if episodes is negative.

    returns: (episodes,) float64, the undiscounted sum of rewards of each episode.
    visits: (9, 8) int64, how often each action was taken in each state.
    """
    returns = np.zeros(episodes)  # (episodes,) float64
    visits = np.zeros((N_STATES, N_ACTIONS), dtype=np.int64)  # (9, 8) int64
    for episode in range(episodes):
        state = grid.start
        for _ in range(max_steps):  # running out of steps is not an end: terminal stays False
            action = agent.act(state)
            next_state, reward, terminal = grid.step(state, action)
            agent.q_update(state, action, reward, next_state, terminal)
            visits[state, action] += 1
            returns[episode] += reward
            state = next_state
            if terminal:
                break
    return returns, visits


def train_agent(agent=None, grid=None, episodes=EPISODES, seed=0, max_steps=MAX_STEPS):
    """Train agent, or a new `Agent` seeded with seed. Return (agent, *run_episodes(...))."""
    agent = Agent(np.random.default_rng(seed)) if agent is None else agent
    return agent, *run_episodes(agent, Grid() if grid is None else grid, episodes, max_steps)


def train_agent_doubleq(agent=None, grid=None, episodes=EPISODES, seed=0, max_steps=MAX_STEPS):
    """Train agent, or a new `AgentDoubleQ` seeded with seed; else the same as `train_agent`."""
    agent = AgentDoubleQ(np.random.default_rng(seed)) if agent is None else agent
    return train_agent(agent, grid, episodes, seed, max_steps)


def greedy_path(policy, grid=None, max_steps=MAX_STEPS):
    """Follow policy, (9,) ints, from the start. Return (states: list of int, return: float).

    A policy that runs in a circle is cut off after max_steps; its last state is not the end.
    """
    grid = Grid() if grid is None else grid
    states, total, terminal = [grid.start], 0.0, False
    while not terminal and len(states) <= max_steps:
        next_state, reward, terminal = grid.step(states[-1], policy[states[-1]])
        states.append(next_state)
        total += reward
    return states, total


# --- Figure: returns, a policy and visits enter; a table in text and a picture leave. ------------
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's: safe if colour-blind
GREY = "#555555"
REWARD_LABEL = f"normalised average reward\nbest return (−1) ÷ mean of last {WINDOW} returns"
HONESTY = (
    f"Faded or with a '?': a square seen fewer than {FEW_VISITS} times. A greedy learner does not\n"
    "visit every corner often enough to have a sensible arrow there: that arrow may be wrong."
)


def normalised_average(returns, window=WINDOW):
    """Return best possible return / mean of the last `window` returns, (episodes,) float64.

    1: the best path every time; 0.5: twice its cost. For returns of `Grid`, which are -1 or less.
    """
    totals = np.concatenate([[0.0], np.cumsum(returns)])  # (episodes + 1,) float64
    last = np.arange(1, len(totals))  # (episodes,) int64
    first = np.maximum(last - window, 0)  # (episodes,) int64
    return BEST_RETURN * (last - first) / (totals[last] - totals[first])


def plot_rewards(ax, returns, label=None, color=BLUE):
    """Draw the normalised rolling average of returns, (episodes,), up to episode 1,000 on ax."""
    scores = normalised_average(returns)[:PLOTTED]  # (at most 1000,) float64
    marker = "o" if len(scores) == 1 else None  # a line through one point does not show
    ax.plot(np.arange(1, len(scores) + 1), scores, color=color, label=label, marker=marker)
    ax.axhline(1, color=GREY, linestyle="--")  # the best path in every episode
    ax.set(ylim=(0, 1.08), xlabel="episode", ylabel=REWARD_LABEL)


def plot_policy(ax, policy, visits):
    """Draw a policy, (9,) ints, on ax as a table of arrows; visits, (9, 8) ints, set the ink."""
    centre = dict(ha="center", va="center")
    for state, count in enumerate(visits.sum(axis=1)):  # (9,) int64
        row, col = divmod(state, SIZE)
        if state == Grid.end:
            ax.text(col, row, "end", size=22, color=ORANGE, weight="bold", **centre)
            continue
        ink = float(np.clip(count / FEW_VISITS, 0.2, 1))
        ax.text(col, row - 0.05, ARROWS[policy[state]], size=44, color=BLUE, alpha=ink, **centre)
        doubt = " ?" if count < FEW_VISITS else ""
        ax.text(col, row + 0.38, f"{count:,} visits{doubt}", size=10, color=GREY, **centre)
        if state == Grid.start:
            ax.text(col - 0.45, row - 0.38, "start", size=11, color=ORANGE, weight="bold")
    edges = np.arange(SIZE + 1) - 0.5  # (4,) float64
    ax.set(xticks=edges, yticks=edges, xlim=edges[[0, -1]], ylim=edges[[-1, 0]], aspect="equal")
    ax.tick_params(length=0, labelbottom=False, labelleft=False)
    ax.grid(True, color=GREY)


def save_whole(path, save):
    """Let save(another path) write a file, then move it to path: whole or not at all (OSError)."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save(unfinished)
        os.replace(unfinished, path)  # atomic: a reader sees the old file or the new one
    finally:
        unfinished.unlink(missing_ok=True)


def save_figure(path, agent, returns, visits):
    """Write rewards and policy side by side to path as PNG, whole or not at all (else OSError)."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{agent.title}, {len(returns):,} episodes", size=15)
    left.set_title(f"While learning: {100 * agent.epsilon:g}% random moves (1 = best path)")
    plot_rewards(left, returns)
    right.set_title("Best policy found")
    plot_policy(right, agent.best_policy(), visits)
    figure.supxlabel(HONESTY, size=10, color=GREY)
    save_whole(path, functools.partial(figure.savefig, format="png", dpi=120))


def policy_text(policy, visits):
    """Return a policy, (9,) ints, as a table of arrows, each with the visits of its square."""
    cells = []
    for action, count in zip(policy, visits.sum(axis=1), strict=True):  # (9,), (9,) int64
        cells.append(f"{ARROWS[action]} {count:>7,}{'?' if count < FEW_VISITS else ' '}")
    cells[Grid.end] = f"{'end':<10}"
    rows = [cells[i : i + SIZE] for i in range(0, N_STATES, SIZE)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# --- Comparison: seeds enter; a row of numbers per world and learner, a table, a figure leave. ----
LEARNERS = {None: Agent, "tutorial": AgentDoubleQ, "hasselt": AgentHasselt}  # by --double
# Noise as in van Hasselt (2010), also on a 3x3 grid: a step costs 12 or pays 10, each half of the
# time, so still -1 on average. The rest stays ours: 8 moves (his: 4), 0 for the end square (5).
# Alpha stays constant (his shrinks): a table remembers the last 1 / alpha = 10 rewards or so, the
# noise never averages out, and so neither does what the max makes of it.
# A greedy agent tries a move that looks too good, and is put right. With random moves only, no move
# is tried more than another, and what is left is the bias of the target itself.
# Each world: its noise, and its share of random moves (None: --epsilon's).
WORLDS = {"plain": (0, None), "noisy": (11, None), "noisy, random moves": (11, 1.0)}
NOISY_EPISODES = 300  # with random moves about 8,000 steps; van Hasselt's figure shows 10,000
SEEDS = 200


class NoisyGrid(Grid):
    """`Grid` with `noise` added to or taken from each -1 by the toss of a coin, drawn from rng."""

    def __init__(self, noise, rng):
        self.noise, self.rng = noise, rng

    def reward(self, next_state):
        noise = self.noise if self.rng.random() < 0.5 else -self.noise
        return super().reward(next_state) + (0 if next_state == self.end else noise)


def optimal_values(gamma):
    """Return the true values, (9, 8) float64, by value iteration. Noise does not change them."""
    grid, values = Grid(), np.zeros((N_STATES, N_ACTIONS))
    for _ in range(N_STATES):  # each pass carries the news one step; no best path is longer
        best = values.max(axis=1)  # (9, 8) -> (9,)
        for state, action in np.ndindex(values.shape):
            next_state, reward, terminal = grid.step(state, action)
            values[state, action] = reward if terminal else reward + gamma * best[next_state]
    return values


def make_agent(rule, seed, settings):
    """Return a new agent. rule: a key of LEARNERS. settings: as `compare` takes them."""
    settings = {k: v for k, v in settings.items() if k != "copy_steps" or rule == "tutorial"}
    return LEARNERS[rule](np.random.default_rng(seed), **settings)


def run_once(rule, noise, episodes, settings, seed):
    """Train one agent. Return a dict of four numbers and a curve, (episodes,) float64."""
    agent = make_agent(rule, seed, settings)
    grid = NoisyGrid(noise, np.random.default_rng([seed, 1]))  # its chances are not the agent's
    returns, values, best = np.zeros((3, episodes))  # (episodes,) float64 each
    for i in range(episodes):
        _, visits = run_episodes(agent, grid, 1)
        returns[i] = 1 - visits.sum()  # without the noise: 0 for the last step, -1 for the others
        values[i] = agent.action_values(grid.start).max()  # (8,) -> float
        best[i] = greedy_path(agent.best_policy(), max_steps=2)[1] == BEST_RETURN
    since = int(np.flatnonzero(best == 0).max(initial=-1)) + 2  # counted from 1
    return {
        "reward": float(normalised_average(returns, episodes)[-1]),
        "best_since": since if since <= episodes else None,
        "best_share": float(best.mean()),
        "value": float(values[-1]),
        "curve": values if noise else normalised_average(returns)[:PLOTTED],
    }


def mean_band(samples):
    """Return the mean over seeds (the first axis) and half the width of its 95 % interval."""
    samples = np.asarray(samples)  # (seeds, ...) float64
    return samples.mean(axis=0), 1.96 * samples.std(axis=0, ddof=1) / np.sqrt(len(samples))


def compare(seeds, settings, episodes=EPISODES, workers=None):
    """Train each learner in each world with each seed. Return a list of rows (dict), fit for JSON.

    settings: dict of alpha, gamma, epsilon, copy_steps. workers: processes, None: one per core. In
    a row "reward" to "value" hold a number for each seed, "mean" and "band" one for each episode.
    """
    rows, true_value = [], optimal_values(settings["gamma"])[Grid.start].max()
    with ProcessPoolExecutor(workers) as pool:
        for (world, (noise, epsilon)), rule in itertools.product(WORLDS.items(), LEARNERS):
            own = settings if epsilon is None else settings | {"epsilon": epsilon}
            length = min(episodes, NOISY_EPISODES) if noise else episodes
            job = functools.partial(run_once, rule, noise, length, own)
            runs = list(pool.map(job, seeds, chunksize=4))
            learner = LEARNERS[rule].title.removeprefix("Double Q-learning, ")
            row = {"world": world, "learner": learner, "episodes": length, "settings": own}
            row |= {"true_value": true_value, "seeds": list(seeds)}
            row |= {key: [run[key] for run in runs] for key in runs[0]}
            mean, band = mean_band(row.pop("curve"))  # (seeds, episodes) -> (episodes,) each
            rows.append(row | {"mean": mean.round(4).tolist(), "band": band.round(4).tolist()})
    return rows


def comparison_table(rows):
    """Return the rows of `compare` as a table in Markdown; every ± and "to" is a 95 % interval."""
    line = "| {:19} | {:18} | {:17} | {:26} | {:5} | {:13} | {:20} |".format
    head = ["world", "learner", "normalised reward", "best path from episode on", "never"]
    lines = [line(*head, "% of the time", "error of max Q(start)"), "| --- " * 7 + "|"]
    for row in rows:
        since = sorted(one or np.inf for one in row["best_since"])
        rank = max(0, int(len(since) / 2 - 0.98 * len(since) ** 0.5) - 1)  # of the interval's end
        median, low, high = (since[i] for i in ((len(since) - 1) // 2, rank, -1 - rank))
        reward, share, error = map(mean_band, (row["reward"], row["best_share"], row["value"]))
        span = "inf" if low == np.inf else f"{median} ({low} to {high})"
        cells = [row["world"], row["learner"], "{:.3f} ± {:.3f}".format(*reward)]
        cells += [span.replace("inf", "never"), since.count(np.inf)]
        cells += [f"{100 * share[0]:.1f} ± {100 * share[1]:.1f}"]
        lines.append(line(*cells, f"{error[0] - row['true_value']:+.2f} ± {error[1]:.2f}"))
    return "\n".join(lines)


def save_comparison(path, rows):
    """Write a figure of the rows of `compare` to path as PNG and the rows beside it as JSON."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(1, len(WORLDS))
    about = "with the 95 % band of that mean. Dotted: the best path, or the true value"
    figure.suptitle(f"Mean of {len(rows[0]['seeds'])} seeds {about}", size=15)
    styles = [(BLUE, "-"), (ORANGE, "--"), (GREEN, "-.")] * len(WORLDS)
    for row, ax, (color, style) in zip(rows, axes.repeat(len(LEARNERS)), styles, strict=True):
        mean, band = np.array([row["mean"], row["band"]])  # (episodes,) float64 each
        episode = np.arange(1, len(mean) + 1)  # (episodes,) int64
        ax.plot(episode, mean, style, color=color, label=row["learner"])
        ax.fill_between(episode, mean - band, mean + band, color=color, alpha=0.3, linewidth=0)
        ax.set(xlabel="episode", ylabel="estimated value of the start, max Q (units of reward)")
        world, share = row["world"].split(",")[0], row["settings"]["epsilon"]
        ax.set_title(f"Rewards: {world}. Random moves: {100 * share:g} %")
        ax.axhline(row["true_value"], color=GREY, linestyle=":")  # outside the first panel's range
    axes[0].axhline(1, color=GREY, linestyle=":")
    axes[0].set(ylim=(0, 1.08), ylabel=REWARD_LABEL)
    axes[0].legend(loc="lower right")
    save_whole(path, functools.partial(figure.savefig, format="png", dpi=120))
    text = "[" + ",\n".join(map(json.dumps, rows)) + "]\n"  # a line for each row
    save_whole(path.with_suffix(".json"), lambda unfinished: unfinished.write_text(text))


# --- Command line: flags enter; printed text and a PNG leave, with --compare a JSON file too. ----
def checked(kind, allowed, wanted):
    """Return a converter for argparse: kind(text) where `allowed`; else it asks for `wanted`."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if allowed(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return convert


def make_parser():
    """Return the parser; every flag is declared here, once."""
    share = checked(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
    rate = checked(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
    count = checked(int, lambda n: 1 <= n <= 10**6, "a whole number from 1 to 1000000")
    several = checked(int, lambda n: 2 <= n <= 10**4, "a whole number from 2 to 10000")
    seed = checked(int, lambda n: n >= 0, "a whole number, 0 or above")
    about = "Q-learning on a 3x3 grid: train, print the policy as arrows, save one figure."
    name = "grid_qlearning.py"
    parser = argparse.ArgumentParser(prog=name, description=about, allow_abbrev=False)
    # a complaint takes one line, without the usual page on how to call the program
    parser.error = lambda message: parser.exit(2, f"{name}: error: {' '.join(message.split())}\n")
    about = "double Q-learning, by the tutorial's rule if none is named (default: plain Q-learning)"
    rules = list(LEARNERS)[1:]
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--double", nargs="?", const="tutorial", choices=rules, help=about)
    about = "all three learners with many seeds, with and without noise: a figure and a table"
    what.add_argument("--compare", action="store_true", help=about)
    about = f"seeds for --compare, from --seed on (default: {SEEDS})"
    parser.add_argument("--seeds", type=several, help=about)
    for flag, converter, default, about in (
        ("--episodes", count, EPISODES, "episodes to train for"),
        ("--seed", seed, 0, "the same seed gives the same numbers"),
        ("--alpha", rate, ALPHA, "learning rate"),
        ("--gamma", share, GAMMA, "discount"),
        ("--epsilon", share, EPSILON, "share of random moves"),
        ("--copy-steps", count, COPY_STEPS, "steps between copies (the tutorial's rule only)"),
        ("--out", Path, Path("runs/grid"), "folder for the figure; an earlier one is overwritten"),
    ):
        about += " (default: %(default)s)"
        parser.add_argument(flag, type=converter, default=default, help=about)
    return parser


def main(argv=None):
    """Train, save the figure and print. argv: list of str, else the command line's own flags."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.seeds and not args.compare:
        parser.error("argument --seeds: only with --compare; --seed picks one")
    names = ("alpha", "gamma", "epsilon", "copy_steps")
    settings = {name: getattr(args, name) for name in names}
    name = "compare" if args.compare else f"double_{args.double}" if args.double else "q"
    path = args.out / f"grid_{name}.png"
    try:
        args.out.mkdir(parents=True, exist_ok=True)  # before the work: a typo costs no time
        if args.compare:
            seeds = range(args.seed, args.seed + (args.seeds or SEEDS))
            print(f"Training with {len(seeds)} seeds; 200 take a minute at most.\n", flush=True)
            rows = compare(seeds, settings, args.episodes)
            save_comparison(path, rows)
            print(f"{comparison_table(rows)}\n\nFigure: {path}, its numbers: the .json beside it")
            return
        agent = make_agent(args.double, args.seed, settings)
        agent, returns, visits = train_agent(agent, episodes=args.episodes)
        save_figure(path, agent, returns, visits)
    except OSError as error:
        reason = f"cannot write {str(path)!r} ({error.strerror})"
        parser.error(f"argument --out: {reason}; name a folder that can be made and written to")
    policy = agent.best_policy()
    states, total = greedy_path(policy)
    cut = "" if states[-1] == Grid.end else f", cut off after {MAX_STEPS} steps short of the end"
    print(f"{agent.title}, {args.episodes:,} episodes, seed {args.seed}\n")
    print(f"{policy_text(policy, visits)}\n\nBeside each arrow: the visits to its square.")
    print(f"{HONESTY}\n\nGreedy return from the start: {total:.0f} (best: {BEST_RETURN}){cut}")
    print(f"Figure: {path}")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # arrows, also when Windows' output goes to a file
    main()
