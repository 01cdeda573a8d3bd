"""Q-learning on a 3x3 grid: the idea behind the Mario agent, with few enough numbers to look at all.

    python grid_qlearning.py                                  Q-learning
    python grid_qlearning.py --double [tutorial|hasselt]      double Q-learning, by one of two rules

"The tutorial" is Andrew Grebenisan, Play Super Mario Bros with a Double Deep Q-Network (Paperspace blog):
https://blog.paperspace.com/building-double-deep-q-network-super-mario-bros/

Three agents share one update and one training loop. The mark "<- changed" shows where they differ."""
import argparse
import os
import signal
import sys
from pathlib import Path

if not (3, 10) <= sys.version_info < (3, 15):
    print(f"grid_qlearning.py: this is Python {sys.version.split()[0]}; it needs Python 3.10 to 3.14", file=sys.stderr)
    raise SystemExit(2)
if __name__ == "__main__":
    def stop(*_):
        print("grid_qlearning.py: stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130)
    signal.signal(signal.SIGINT, stop)  # here, because the imports below take half a second

import numpy as np
from matplotlib.figure import Figure  # not pyplot, which looks for a display

# ===== 1. Settings. In: nothing. Out: the default values of everything below.
ALPHA = 0.1  # learning rate. Here 1.0 would do, because nothing is random; 0.1 also averages over noise
GAMMA = 0.9  # discount, the tutorial's value for Mario
EPSILON = 0.1  # share of random moves. With 0.0 van Hasselt's values stay wrong (notebook 1, exercise 4)
COPY_STEPS = 100  # steps between two copies (tutorial's double rule); 100 steps are about 43 episodes
EPISODES = 2000
MAX_STEPS = 100  # limit of an episode; the longest one in 300 trainings took 73 steps
PLOTTED = 1000  # episodes in the figure; the later ones look like the last of these
WINDOW = 50  # episodes in the rolling average
FEW_VISITS = 200  # a square seen less often has a faded arrow; of these, one in five was wrong in 300 trainings

# ===== 2. Grid. In: a state and an action. Out: the next state, the reward, terminal.
SIZE = 3
N_STATES = SIZE * SIZE  # state = 3 * row + column; row 0 is the top row
MOVES = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # (rows down, columns right)
ARROWS = "↑↗→↘↓↙←↖"  # the same eight moves in the same order
N_ACTIONS = len(MOVES)
BEST_RETURN = -1  # two diagonal moves: -1, then 0


class Grid:
    """3x3 squares with the start at the bottom left and the end at the top right. A state is the number of a
    square (int, 0 to 8). An action is the number of a move in `MOVES` (int, 0 to 7)."""
    start, end = 6, 2

    def step(self, state, action):
        """One step -> next state (int), reward (float), terminal (bool): it reached the end square."""
        down, right = MOVES[action]
        row, col = state // SIZE + down, state % SIZE + right
        inside = 0 <= row < SIZE and 0 <= col < SIZE
        next_state = SIZE * row + col if inside else state  # a move off the grid leaves the agent where it is
        return next_state, self.reward(next_state), next_state == self.end

    def reward(self, next_state):
        """The reward (float) of a move that led to this state."""
        return 0.0 if next_state == self.end else -1.0


# ===== 3. Agents. In: a random generator and settings. Out: a table of action values.
class Agent:
    """Q-learning (Watkins 1989; Sutton and Barto 2018, section 6.5). `rng`, a np.random.Generator, is the
    source of all its random numbers. `q_table`, (9, 8) float64, is what it learns: for each state and action the
    return to expect, in units of reward."""
    title = "Q-learning"

    def __init__(self, rng, alpha=ALPHA, gamma=GAMMA, epsilon=EPSILON):
        if not (0 < alpha <= 1 and 0 <= gamma <= 1 and 0 <= epsilon <= 1):
            raise ValueError("need alpha in (0, 1], gamma in [0, 1] and epsilon in [0, 1]")
        self.rng, self.alpha, self.gamma, self.epsilon = rng, alpha, gamma, epsilon
        # No return is above 0, so among zeros an untried action looks best, and the agent tries it.
        self.q_table = np.zeros((N_STATES, N_ACTIONS))  # (9, 8) float64

    def action_values(self, state=slice(None)):  # slice(None) stands for ":", all states
        """The values that the agent acts on, (8,) float64; without a state all of them, (9, 8)."""
        return self.q_table[state]

    def act(self, state):
        """ε-greedy: a random action (int) with probability epsilon, otherwise a best one."""
        if self.rng.random() < self.epsilon:
            return int(self.rng.integers(N_ACTIONS))
        values = self.action_values(state)  # (8,) float64
        best = np.flatnonzero(values == values.max())  # one action, or several equally good ones
        # In a new table all eight are equally good. A draw prefers none; argmax would always go up.
        return int(self.rng.choice(best))

    def td_target(self, reward, next_state):
        """What Q(s, a) should have been (float), after a step that did not reach the end."""
        # target = r + γ max_a' Q(s', a')
        return reward + self.gamma * self.q_table[next_state].max()

    def q_update(self, state, action, reward, next_state, terminal):
        """One update, from one step."""
        # target = r, if s' is the end, because no reward follows
        target = reward if terminal else self.td_target(reward, next_state)
        # δ = target - Q(s, a)
        td_error = target - self.q_table[state, action]
        # Q(s, a) ← Q(s, a) + α δ
        self.q_table[state, action] += self.alpha * td_error

    def best_policy(self):
        """The first of the best actions of each state, (9,) int64; at the end it means nothing."""
        return self.action_values().argmax(axis=1)  # (9, 8) -> (9,)


class AgentDoubleQ(Agent):
    """The tutorial's double Q-learning: a target network (Mnih et al. 2015) in the form of a table.
    q_target, (9, 8) float64, is a copy of q_table, made anew every `copy_steps` steps."""
    title = "Double Q-learning, tutorial's rule"

    def __init__(self, rng, alpha=ALPHA, gamma=GAMMA, epsilon=EPSILON, copy_steps=COPY_STEPS):
        super().__init__(rng, alpha, gamma, epsilon)
        self.copy_steps, self.steps = copy_steps, 0
        self.q_target = self.q_table.copy()  # (9, 8) float64

    def td_target(self, reward, next_state):
        # target = r + γ max_a' Q_target(s', a')
        return reward + self.gamma * self.q_target[next_state].max()  # <- changed: max over the older copy

    def q_update(self, state, action, reward, next_state, terminal):
        super().q_update(state, action, reward, next_state, terminal)
        self.steps += 1
        if self.steps % self.copy_steps == 0:
            self.q_target = self.q_table.copy()  # <- changed: a new copy


class AgentHasselt(Agent):
    """Double Q-learning (van Hasselt 2010, algorithm 1; Sutton and Barto 2018, section 6.7). It learns
    two tables, (9, 8) float64 each. Before each update a fair coin decides which of them is q_table. This
    table learns, and it picks the next action. The other one, q_other, values that action."""
    title = "Double Q-learning, van Hasselt's rule"

    def __init__(self, rng, alpha=ALPHA, gamma=GAMMA, epsilon=EPSILON):
        super().__init__(rng, alpha, gamma, epsilon)
        self.q_other = self.q_table.copy()  # (9, 8) float64

    def action_values(self, state=slice(None)):
        return (self.q_table[state] + self.q_other[state]) / 2  # <- changed: mean of both tables

    def td_target(self, reward, next_state):
        best_action = self.q_table[next_state].argmax()  # <- changed: one table picks the action
        # target = r + γ Q_other(s', argmax_a' Q(s', a'))
        return reward + self.gamma * self.q_other[next_state, best_action]  # <- changed: the other one values it

    def q_update(self, state, action, reward, next_state, terminal):
        if self.rng.random() < 0.5:
            self.q_table, self.q_other = self.q_other, self.q_table  # <- changed: the tables swap their roles
        super().q_update(state, action, reward, next_state, terminal)


# ===== 4. Training loop. In: an agent and a grid. Out: the trained agent, its returns and its visits.
def run_episodes(agent, grid, episodes=EPISODES, max_steps=MAX_STEPS):
    """Trains an agent for some episodes of at most max_steps steps. Returns the sum of rewards of each episode,
    (episodes,) float64, and how often the agent took each action in each state, (9, 8) int64."""
    returns = np.zeros(episodes)  # (episodes,) float64
    visits = np.zeros((N_STATES, N_ACTIONS), dtype=np.int64)  # (9, 8) int64
    for episode in range(episodes):
        state = grid.start
        for _ in range(max_steps):  # an episode cut off here has not reached the end: terminal stays False
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
    """Trains the agent, or a new `Agent` with this seed. Returns the agent, its returns and visits."""
    agent = agent or Agent(np.random.default_rng(seed))
    returns, visits = run_episodes(agent, grid or Grid(), episodes, max_steps)
    return agent, returns, visits


def train_agent_doubleq(agent=None, grid=None, episodes=EPISODES, seed=0, max_steps=MAX_STEPS):
    """Trains the agent, or a new `AgentDoubleQ` with this seed. Returns the same as `train_agent`."""
    agent = agent or AgentDoubleQ(np.random.default_rng(seed))
    return train_agent(agent, grid, episodes, seed, max_steps)


def greedy_path(policy, grid=None, max_steps=MAX_STEPS):
    """Follows a policy, (9,) ints, from the start to the end, for at most max_steps steps. Returns the states (list
    of int) and the return (float)."""
    grid = grid or Grid()
    states, total, terminal = [grid.start], 0.0, False
    while not terminal and len(states) <= max_steps:
        next_state, reward, terminal = grid.step(states[-1], policy[states[-1]])
        states.append(next_state)
        total += reward
    return states, total


# ===== 5. Figure. In: returns, a policy, visits. Out: a picture, and a table of arrows as text.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#555555"  # safe for the colour-blind (Okabe and Ito)
REWARD_LABEL = f"normalised average reward\nbest return (−1) ÷ mean of last {WINDOW} returns"
CAVEAT = (f"Faded or with a '?': a square seen fewer than {FEW_VISITS} times. A greedy learner does not\n"
          "visit every corner often enough to have a sensible arrow there: that arrow may be wrong.")


def normalised_average(returns, window=WINDOW):
    """The best return ÷ the mean of the last `window` returns, (episodes,) float64 like `returns`: 1 for the best path
    in every episode, 0.5 for twice its cost."""
    means = [np.mean(returns[max(0, end - window):end]) for end in range(1, len(returns) + 1)]
    return BEST_RETURN / np.array(means)


def plot_rewards(ax, returns, label=None, color=BLUE):
    """Draws on ax the normalised average of returns, (episodes,) float64, up to episode 1,000."""
    scores = normalised_average(returns[:PLOTTED])  # (at most 1000,) float64
    ax.plot(np.arange(1, len(scores) + 1), scores, color=color, label=label)
    ax.axhline(1, color=GREY, linestyle="--")  # the best path in every episode
    ax.set(ylim=(0, 1.08), xlabel="episode", ylabel=REWARD_LABEL)


def plot_policy(ax, policy, visits):
    """Draws on ax a policy, (9,) ints, as arrows, each with the visits, (9, 8) ints, to its square."""
    for state, count in enumerate(visits.sum(axis=1)):  # (9, 8) -> (9,)
        row, col = divmod(state, SIZE)
        word = {Grid.start: "start", Grid.end: "end"}.get(state, "")
        ax.text(col - 0.45, row - 0.36, word, size=11, color=ORANGE)
        if state != Grid.end:
            ink = float(np.clip(count / FEW_VISITS, 0.2, 1))  # 1 is full colour
            ax.text(col, row, ARROWS[policy[state]], size=44, color=BLUE, alpha=ink, ha="center", va="center")
            ax.text(col, row + 0.44, f"{count:,} visits", size=10, color=GREY, ha="center")
    edges = np.arange(SIZE + 1) - 0.5  # (4,) float64
    ax.set(xticks=edges, yticks=edges, xlim=edges[[0, -1]], ylim=edges[[-1, 0]], aspect="equal")
    ax.tick_params(length=0, labelbottom=False, labelleft=False)
    ax.grid(True, color=GREY)


def policy_text(policy, visits):
    """A policy, (9,) ints, and visits, (9, 8) ints, as a table of text, a cell for each square."""
    cells = []
    for action, count in zip(policy, visits.sum(axis=1), strict=True):  # (9,), (9,)
        cells.append(f"{ARROWS[action]} {count:>7,}{'?' if count < FEW_VISITS else ' '}")
    cells[Grid.end] = f"{'end':<10}"
    return "\n".join(f"| {' | '.join(cells[first:first + SIZE])} |" for first in range(0, N_STATES, SIZE))


def save_whole(path, save):
    """Writes a file with save(another path), then moves it to path, so that path is never half full."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_figure(path, agent, returns, visits):
    """Draws rewards and policy side by side and writes them to path as PNG."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{agent.title}, {len(returns):,} episodes, {100 * agent.epsilon:g} % random moves", size=15)
    plot_rewards(left, returns)
    plot_policy(right, agent.best_policy(), visits)
    figure.supxlabel(CAVEAT, size=10, color=GREY)
    save_whole(path, lambda unfinished: figure.savefig(unfinished, format="png", dpi=120))


# ===== 6. Command line. In: flags. Out: text and a picture.
LEARNERS = {None: Agent, "tutorial": AgentDoubleQ, "hasselt": AgentHasselt}  # by the word after --double


def between(kind, low, high):
    """A function that turns text into a number of that kind from low to high, for argparse."""
    def convert(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
    convert.__name__ = kind.__name__  # argparse's own error names it: "invalid int value"
    return convert


def make_parser():
    """A flag for each setting that can be typed."""
    parser = argparse.ArgumentParser("grid_qlearning.py", description="Q-learning on a 3x3 grid", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {' '.join(message.split())}\n")  # one line
    about = "double Q-learning, by the tutorial's rule if none is named (default: plain Q-learning)"
    parser.add_argument("--double", nargs="?", const="tutorial", choices=("tutorial", "hasselt"), help=about)
    for flag, kind, default, about in (
        ("--episodes", between(int, 1, 10**6), EPISODES, "episodes to train for"),
        ("--seed", between(int, 0, 10**9), 0, "the same seed gives the same numbers"),
        ("--alpha", between(float, 0.0001, 1), ALPHA, "learning rate"),
        ("--gamma", between(float, 0, 1), GAMMA, "discount"),
        ("--epsilon", between(float, 0, 1), EPSILON, "share of random moves"),
        ("--out", Path, Path("runs/grid"), "folder for the figure, which replaces an older one"),
    ):
        parser.add_argument(flag, type=kind, default=default, help=f"{about} (default: %(default)s)")
    about = f"steps between two copies, only with --double tutorial (default: {COPY_STEPS})"
    parser.add_argument("--copy-steps", type=between(int, 1, 10**6), help=about)
    return parser


def main(argv=None):
    """The program: trains an agent, saves its figure and prints its policy. argv: by default the command line."""
    parser = make_parser()
    settings = parser.parse_args(argv)
    if settings.copy_steps and settings.double != "tutorial":
        parser.error("argument --copy-steps: only with --double tutorial, because no other rule makes copies")
    rng = np.random.default_rng(settings.seed)
    agent = LEARNERS[settings.double](rng, settings.alpha, settings.gamma, settings.epsilon)
    if settings.copy_steps:
        agent.copy_steps = settings.copy_steps
    path = settings.out / f"grid_{'double_' + settings.double if settings.double else 'q'}.png"
    try:
        settings.out.mkdir(parents=True, exist_ok=True)  # first, because a bad folder would waste the training
        agent, returns, visits = train_agent(agent, episodes=settings.episodes)
        save_figure(path, agent, returns, visits)
        policy = agent.best_policy()
        print(f"{agent.title}, {settings.episodes:,} episodes, seed {settings.seed}. Arrows and visits:\n")
        print(f"{policy_text(policy, visits)}\n\n{CAVEAT}\n\nFigure: {path}")
        print(f"Greedy return from the start: {greedy_path(policy)[1]:.0f} (best: {BEST_RETURN})", flush=True)
    except OSError as error:
        sys.stdout = None  # otherwise Python prints the rest when it ends, and fails once more
        parser.error(f"cannot save or print the result: {error}")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # arrows, whatever the terminal's encoding is
    main()
