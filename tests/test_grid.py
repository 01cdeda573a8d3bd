"""What grid_qlearning.py promises. The oracle is value iteration on the same grid, written here."""

import inspect
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import grid_qlearning as gq
from grid_qlearning import Agent, AgentDoubleQ, AgentHasselt, Grid

LEARNERS = [Agent, AgentDoubleQ, AgentHasselt]
SEEDS = range(100)
STEP_BY_ARROW = {  # right, up
    "↑": (0, 1), "↗": (1, 1), "→": (1, 0), "↘": (1, -1),
    "↓": (0, -1), "↙": (-1, -1), "←": (-1, 0), "↖": (-1, 1),
}  # fmt: skip
UP, UP_RIGHT, RIGHT = (gq.ARROWS.index(arrow) for arrow in "↑↗→")
CENTRE, CORNER = 4, 8  # a square one move from the end; the corner at bottom right


def rng(seed=0):
    return np.random.default_rng(seed)


def value_iteration(gamma):
    """Q* of the grid, (9, 8): Q(s, a) = r + gamma max_a' Q(s', a'), without a future at the end."""
    grid, q = Grid(), np.zeros((9, 8))
    for _ in range(200):
        new = np.zeros((9, 8))
        for state in range(9):
            for action in range(8):
                next_state, reward, terminal = grid.step(state, action)
                new[state, action] = reward + (0 if terminal else gamma * q[next_state].max())
        q = new
    return q


class ScriptedRng:
    """Stands in for a Generator: random() gives the numbers listed, in turn."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


@pytest.fixture(scope="module")
def trained():
    """{class: [agent of seed 0, 1, ... 99]}, all with the default settings."""
    agents = {learner: [] for learner in LEARNERS}
    for learner in LEARNERS:
        train = gq.train_agent if learner is Agent else gq.train_agent_doubleq
        for seed in SEEDS:
            agents[learner].append(train(learner(rng(seed)))[0])
    return agents


# --- Grid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrow", STEP_BY_ARROW)
@pytest.mark.parametrize("state", range(9))
def test_every_move_from_every_square(state, arrow):
    right, up = state % 3, 2 - state // 3  # column from the left, row from the bottom
    new_right, new_up = right + STEP_BY_ARROW[arrow][0], up + STEP_BY_ARROW[arrow][1]
    if new_right not in (0, 1, 2) or new_up not in (0, 1, 2):
        new_right, new_up = right, up
    at_end = (new_right, new_up) == (2, 2)
    expected = 3 * (2 - new_up) + new_right, 0 if at_end else -1, at_end
    assert Grid().step(state, gq.ARROWS.index(arrow)) == expected


def test_a_move_off_the_grid_stays_and_costs_one():
    assert Grid().step(Grid.start, gq.ARROWS.index("↙")) == (Grid.start, -1, False)


def test_start_is_bottom_left_and_end_top_right():
    assert (Grid.start, Grid.end) == (6, 2)
    assert sorted(gq.ARROWS) == sorted(STEP_BY_ARROW)


@pytest.mark.parametrize(
    ("moves", "squares", "total"), [("→→↑↑", [7, 8, 5, 2], -3), ("↗↗", [4, 2], -1)]
)
def test_known_paths_return_what_the_tutorial_says(moves, squares, total):
    state, rewards, seen, terminals = Grid.start, [], [], []
    for arrow in moves:
        state, reward, terminal = Grid().step(state, gq.ARROWS.index(arrow))
        rewards.append(reward)
        seen.append(state)
        terminals.append(terminal)
    assert (seen, sum(rewards)) == (squares, total)
    assert terminals == [False] * (len(moves) - 1) + [True]


def test_overriding_reward_is_enough_for_a_noisy_grid():
    class Noisy(Grid):
        noise = rng(3)

        def reward(self, next_state):
            return super().reward(next_state) + self.noise.normal()

    _, returns, _ = gq.train_agent(grid=Noisy(), episodes=20)
    assert not np.any(returns == np.round(returns))


# --- Learning against the oracle -----------------------------------------------------------------


def test_the_oracle_agrees_with_the_best_path():
    q = value_iteration(0.9)
    assert q[Grid.start].max() == -1
    assert q[Grid.start, RIGHT] == pytest.approx(-1.9)
    assert q[CENTRE, UP_RIGHT] == 0


@pytest.mark.parametrize("learner", LEARNERS)
def test_all_100_seeds_learn_the_best_return(trained, learner):
    paths = [gq.greedy_path(agent.best_policy()) for agent in trained[learner]]
    assert paths == [([Grid.start, CENTRE, Grid.end], -1)] * len(SEEDS)


@pytest.mark.parametrize("learner", LEARNERS)
def test_values_on_the_greedy_path_match_value_iteration(trained, learner):
    oracle = value_iteration(gq.GAMMA)
    for agent in trained[learner]:
        policy, values = agent.best_policy(), agent.action_values()
        for state in gq.greedy_path(policy)[0][:-1]:
            assert values[state, policy[state]] == pytest.approx(
                oracle[state, policy[state]], abs=1e-2
            )


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_whole_table_matches_value_iteration_if_every_pair_is_visited(learner):
    agent = learner(rng(), epsilon=1.0)
    if learner is AgentDoubleQ:
        agent.copy_steps = 20
    gq.run_episodes(agent, Grid(), 1500)
    oracle = value_iteration(gq.GAMMA)
    oracle[Grid.end] = 0  # the episode is over there, nothing is learnt
    np.testing.assert_allclose(agent.action_values(), oracle, atol=1e-2)


# --- One update at a time ------------------------------------------------------------------------


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_terminal_step_has_the_reward_as_its_target(learner):
    agent = learner(ScriptedRng(0.9), alpha=0.25, gamma=0.9)
    for table in (agent.q_table, getattr(agent, "q_target", None), getattr(agent, "q_other", None)):
        if table is not None:
            table[:] = 7  # a future that must not be added
    agent.q_table[CENTRE, UP_RIGHT] = 4
    agent.q_update(CENTRE, UP_RIGHT, -2.0, Grid.end, True)
    assert agent.q_table[CENTRE, UP_RIGHT] == 4 + 0.25 * (-2 - 4)  # 2.5


def test_hand_computed_update_of_q_learning():
    agent = Agent(rng(), alpha=0.5, gamma=0.9)
    agent.q_table[3, 2] = -2
    agent.q_table[4] = [-9, -5, -3, -4, -7, -6, -8, -10]
    before = agent.q_table.copy()
    agent.q_update(3, 2, -1.0, 4, False)
    # target = -1 + 0.9 * -3 = -3.7;  Q = -2 + 0.5 * (-3.7 + 2) = -2.85
    before[3, 2] = -2.85
    np.testing.assert_allclose(agent.q_table, before, rtol=1e-12)


def test_hand_computed_update_of_the_tutorials_double_rule():
    agent = AgentDoubleQ(rng(), alpha=0.5, gamma=0.9, copy_steps=10)
    agent.q_table[3, 2] = -2
    agent.q_table[4] = [-1, -20, -20, -20, -20, -20, -20, -20]
    agent.q_target[4] = [-9, -5, -3, -4, -7, -6, -8, -10]
    before, target_before = agent.q_table.copy(), agent.q_target.copy()
    agent.q_update(3, 2, -1.0, 4, False)
    # target = -1 + 0.9 * max q_target = -1 + 0.9 * -3 = -3.7;  Q = -2 + 0.5 * (-3.7 + 2) = -2.85
    # (the max of q_table would give -1.95; q_target at q_table's best action -5.55)
    before[3, 2] = -2.85
    np.testing.assert_allclose(agent.q_table, before, rtol=1e-12)
    np.testing.assert_array_equal(agent.q_target, target_before)


@pytest.mark.parametrize(
    ("coin", "expected_a", "expected_b"),
    [
        # A learns and picks action 2, B values it: -1 + 0.9 * -6 = -6.4;  -2 + 0.5 * -4.4
        (0.5, -4.2, -4),
        # B learns and picks action 0, A values it: -1 + 0.9 * -9 = -9.1;  -4 + 0.5 * -5.1
        (0.4999, -2, -6.55),
    ],
)
def test_hand_computed_update_of_van_hasselts_rule(coin, expected_a, expected_b):
    agent = AgentHasselt(ScriptedRng(coin), alpha=0.5, gamma=0.9)
    table_a, table_b = agent.q_table, agent.q_other
    table_a[3, 2], table_b[3, 2] = -2, -4
    table_a[4] = [-9, -5, -3, -4, -7, -6, -8, -10]
    table_b[4] = [-1, -5, -6, -4, -7, -2, -8, -10]
    before_a, before_b = table_a.copy(), table_b.copy()
    agent.q_update(3, 2, -1.0, 4, False)
    before_a[3, 2], before_b[3, 2] = expected_a, expected_b
    np.testing.assert_allclose(table_a, before_a, rtol=1e-12)
    np.testing.assert_allclose(table_b, before_b, rtol=1e-12)


@pytest.mark.parametrize("copy_steps", [1, 3, 100])
def test_q_target_is_refreshed_exactly_every_copy_steps_steps(copy_steps):
    agent = AgentDoubleQ(rng(), copy_steps=copy_steps)
    expected = agent.q_table.copy()
    for step in range(1, 3 * copy_steps + 3):
        terminal = step % 4 == 0  # the ends of episodes must make no difference
        agent.q_update(step % 9, step % 8, -1.0, (step + 1) % 9, terminal)
        if step % copy_steps == 0:
            expected = agent.q_table.copy()
        np.testing.assert_array_equal(agent.q_target, expected, err_msg=f"after step {step}")
    assert agent.q_target is not agent.q_table


def test_van_hasselts_learner_changes_exactly_one_table_each_time_and_both_in_turn():
    agent = AgentHasselt(rng(5))
    tables = [agent.q_table, agent.q_other]
    changed = []
    for _ in range(400):
        before = [table.copy() for table in tables]
        agent.q_update(3, 2, float(agent.rng.normal()), 4, False)
        differ = [i for i in (0, 1) if not np.array_equal(tables[i], before[i])]
        assert len(differ) == 1
        changed += differ
    assert 150 < sum(changed) < 250  # a fair coin: 200 on average, standard deviation 10


# --- Acting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", LEARNERS)
def test_greedy_act_and_best_policy_pick_the_best_action(learner):
    agent = learner(rng(), epsilon=0.0)
    agent.q_table[:] = -5
    agent.q_table[range(9), [3, 1, 4, 1, 5, 2, 6, 5, 0]] = -1
    assert [agent.act(state) for state in range(9)] == [3, 1, 4, 1, 5, 2, 6, 5, 0]
    assert agent.best_policy().tolist() == [3, 1, 4, 1, 5, 2, 6, 5, 0]


@pytest.mark.parametrize("learner", LEARNERS)
def test_ties_are_drawn_by_lot(learner):
    agent = learner(rng(), epsilon=0.0)
    agent.q_table[CORNER, [0, 3, 6]] = 1
    picks = np.bincount([agent.act(CORNER) for _ in range(3000)], minlength=8)
    assert np.flatnonzero(picks).tolist() == [0, 3, 6]
    assert picks[[0, 3, 6]].min() > 850


def test_epsilon_is_the_share_of_random_moves():
    agent = Agent(rng(), epsilon=0.4)
    agent.q_table[CORNER, 5] = 1
    picks = np.bincount([agent.act(CORNER) for _ in range(8000)], minlength=8)
    assert picks[5] / 8000 == pytest.approx(0.6 + 0.4 / 8, abs=0.02)
    others = np.delete(picks, 5) / 8000
    assert others == pytest.approx(np.full(7, 0.4 / 8), abs=0.015)


def test_van_hasselts_learner_acts_on_both_tables():
    agent = AgentHasselt(rng(), epsilon=0.0)
    agent.q_table[CORNER], agent.q_other[CORNER] = -8, -8
    agent.q_table[CORNER, [1, 3]] = -1, -2
    agent.q_other[CORNER, [2, 3]] = -1, -2
    assert agent.act(CORNER) == 3 == agent.best_policy()[CORNER]
    assert agent.action_values(CORNER)[3] == -2


# --- Training loop -------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", LEARNERS)
def test_same_seed_same_tables_and_no_global_random_state(learner):
    random.seed(1)
    np.random.seed(1)
    runs = []
    for seed in (7, 7, 8):
        agent = learner(rng(seed))
        returns, visits = gq.run_episodes(agent, Grid(), 100)
        runs.append([returns, visits, agent.action_values(), agent.q_table])
        np.random.rand(), random.random()
    for first, second in zip(runs[0], runs[1], strict=True):
        np.testing.assert_array_equal(first, second)
    assert not np.array_equal(runs[0][2], runs[2][2])


def test_training_functions_share_the_loop_and_default_to_2000_episodes():
    for train, learner in [(gq.train_agent, Agent), (gq.train_agent_doubleq, AgentDoubleQ)]:
        assert inspect.signature(train).parameters["episodes"].default == 2000
        agent, returns, visits = train(episodes=50, seed=11)
        same = learner(rng(11))
        expected_returns, expected_visits = gq.run_episodes(same, Grid(), 50)
        assert type(agent) is learner
        np.testing.assert_array_equal(agent.q_table, same.q_table)
        np.testing.assert_array_equal(returns, expected_returns)
        np.testing.assert_array_equal(visits, expected_visits)
    given = AgentHasselt(rng())
    assert gq.train_agent_doubleq(given, episodes=5)[0] is given


def test_returns_and_visits_count_what_happened():
    _, returns, visits = gq.train_agent(episodes=200, seed=2)
    assert (returns.shape, visits.shape) == ((200,), (9, 8))
    # no episode is cut short here, so each ends with the one step that costs nothing
    assert visits.sum() == 200 - returns.sum()
    assert visits[Grid.end].sum() == 0
    assert returns.max() <= gq.BEST_RETURN


@pytest.mark.parametrize("learner", LEARNERS)
def test_running_out_of_steps_is_not_an_end(learner):
    flags = []

    class Spy(learner):
        def q_update(self, state, action, reward, next_state, terminal):
            flags.append(terminal)
            super().q_update(state, action, reward, next_state, terminal)

    agent = Spy(rng(), alpha=1.0, gamma=0.5, epsilon=0.0)
    for name in ("q_table", "q_target", "q_other"):
        if hasattr(agent, name):
            getattr(agent, name)[:] = -8
    returns, visits = gq.run_episodes(agent, Grid(), episodes=1, max_steps=1)
    assert (returns.tolist(), visits.sum(), flags) == ([-1], 1, [False])
    assert agent.q_table[Grid.start].max() == -1 + 0.5 * -8  # the future was added: -5, not -1


def test_a_policy_that_runs_in_a_circle_is_cut_off():
    states, total = gq.greedy_path(np.zeros(9, dtype=int), max_steps=12)  # up, and up against it
    assert (states[-1], total) == (0, -12)


@pytest.mark.parametrize(
    "settings", [{"alpha": 0}, {"alpha": 1.1}, {"gamma": -0.1}, {"gamma": 2}, {"epsilon": 1.5}]
)
@pytest.mark.parametrize("learner", LEARNERS)
def test_agents_refuse_settings_out_of_range(learner, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        learner(rng(), **settings)


def test_double_agent_refuses_copy_steps_below_one():
    with pytest.raises(ValueError, match="copy_steps"):
        AgentDoubleQ(rng(), copy_steps=0)


# --- Figure and text -----------------------------------------------------------------------------


def test_normalised_average_is_best_return_over_rolling_mean():
    scores = gq.normalised_average(np.array([-1.0, -3.0, -1.0, -1.0, -4.0]), window=2)
    np.testing.assert_allclose(scores, [1, 1 / 2, 1 / 2, 1, 1 / 2.5])


def test_policy_text_marks_the_end_and_squares_seldom_seen():
    visits = np.full((9, 8), 100)
    visits[0] = 0
    visits[8] = [gq.FEW_VISITS - 1, 0, 0, 0, 0, 0, 0, 0]
    rows = gq.policy_text(np.array([0, 1, 2, 3, 4, 5, 6, 7, 0]), visits).splitlines()
    cells = [[cell.split() for cell in row.strip("|").split("|")] for row in rows]
    assert cells == [
        [["↑", "0?"], ["↗", "800"], ["end"]],
        [["↘", "800"], ["↓", "800"], ["↙", "800"]],
        [["←", "800"], ["↖", "800"], ["↑", "199?"]],
    ]
    assert len({len(row) for row in rows}) == 1


def test_the_policy_picture_fades_squares_seldom_seen():
    figure = gq.Figure()
    visits = np.full((9, 8), 1000)
    visits[CORNER] = 1
    gq.plot_policy(figure.subplots(), np.full(9, UP), visits)
    ink = [text.get_alpha() for text in figure.axes[0].texts if text.get_text() == "↑"]
    assert sorted(ink) == [0.2] + [1.0] * 7


def test_the_reward_curve_shows_at_most_the_first_1000_episodes():
    ax = gq.Figure().subplots()
    gq.plot_rewards(ax, np.full(1500, -2.0))
    curve = ax.lines[0]
    assert (curve.get_xdata()[[0, -1]].tolist(), set(curve.get_ydata())) == ([1, 1000], {0.5})


# --- Comparison ----------------------------------------------------------------------------------

SETTINGS = {"alpha": 0.1, "gamma": 0.9, "epsilon": 0.1, "copy_steps": 100}
COMMITTED = Path(gq.__file__).parent / "results" / "grid_compare.json"
PER_SEED = ("reward", "best_since", "best_share", "value")


def test_noise_is_minus_12_or_10_evenly_and_never_at_the_end():
    grid, again = gq.NoisyGrid(11, rng(5)), gq.NoisyGrid(11, rng(5))
    rewards = [grid.reward(CENTRE) for _ in range(2000)]
    assert set(rewards) == {-12, 10}
    assert rewards.count(10) == pytest.approx(1000, abs=100)  # standard deviation 22
    assert {grid.reward(Grid.end) for _ in range(50)} == {0}
    assert [again.reward(CENTRE) for _ in range(2000)] == rewards
    assert {gq.NoisyGrid(0, rng()).reward(CENTRE) for _ in range(50)} == {-1}


@pytest.mark.parametrize("gamma", [0, 0.5, 0.9, 1])
def test_optimal_values_are_those_of_the_oracle(gamma):
    mine, oracle = gq.optimal_values(gamma), value_iteration(gamma)
    np.testing.assert_allclose(mine, oracle, atol=1e-12)
    assert mine[Grid.start].max() == -1


@pytest.mark.parametrize("rule", gq.LEARNERS)
def test_a_run_of_the_comparison_is_an_ordinary_training(rule):
    run = gq.run_once(rule, 0, 150, SETTINGS, seed=4)
    agent = gq.LEARNERS[rule](rng(4))
    returns, best = [], []
    for _ in range(150):
        returns += gq.run_episodes(agent, Grid(), 1)[0].tolist()
        best.append(gq.greedy_path(agent.best_policy())[0] == [Grid.start, CENTRE, Grid.end])
    assert run["reward"] == -150 / sum(returns)
    assert run["value"] == agent.action_values(Grid.start).max()
    assert run["best_share"] == sum(best) / 150
    since = next((e for e in range(1, 151) if all(best[e - 1 :])), None)
    assert run["best_since"] == since != 1
    np.testing.assert_array_equal(run["curve"], gq.normalised_average(np.array(returns)))


def test_noise_is_left_out_of_the_reward_and_the_curve_is_the_value():
    run = gq.run_once(None, 11, 40, SETTINGS | {"epsilon": 1.0}, seed=1)
    agent, grid = Agent(rng(1), epsilon=1.0), gq.NoisyGrid(11, rng([1, 1]))
    visits, values = 0, []
    for _ in range(40):
        visits += gq.run_episodes(agent, grid, 1)[1].sum()
        values.append(agent.q_table[Grid.start].max())
    assert run["reward"] == pytest.approx(-40 / (40 - visits))
    assert run["curve"].tolist() == values


def test_the_number_of_workers_changes_no_number():
    one = gq.compare(range(3, 9), SETTINGS, episodes=12, workers=1)
    assert one == gq.compare(range(3, 9), SETTINGS, episodes=12, workers=3)
    assert one[0]["seeds"] == [3, 4, 5, 6, 7, 8]
    for row in one:
        assert len(set(row["value"])) > 1  # the seeds do differ


def test_the_comparison_repeats_its_committed_numbers():
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    again = gq.compare(range(3), SETTINGS)
    assert len(committed) == len(again) == 9
    for old, new in zip(committed, again, strict=True):
        assert old["seeds"] == list(range(200))
        for key in ("world", "learner", "episodes", "settings", "true_value"):
            assert old[key] == new[key]
        for key in PER_SEED:
            assert old[key][:3] == new[key], (old["world"], old["learner"], key)
        # the curve's last point is made of the same 200 final values
        if old["world"] != "plain":
            assert old["mean"][-1] == pytest.approx(np.mean(old["value"]), abs=1e-4)


def test_the_verdict_in_readme_is_what_the_numbers_say():
    def low_high(key, world, minus=0.0):
        """The 95 % intervals of the three learners, in their order."""
        rows = [row for row in committed if row["world"] == world]
        means = [gq.mean_band(np.array(row[key]) - minus) for row in rows]
        return [(mean - half, mean + half) for mean, half in means]

    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    for low, high in low_high("value", "plain", minus=-1):  # nothing to fix
        assert -0.01 < low <= high < 0.01
    single, tutorial, hasselt = low_high("reward", "plain")  # the double rules learn later
    assert hasselt[1] < tutorial[0] and tutorial[1] < single[0]
    single, tutorial, hasselt = low_high("value", "noisy, random moves", minus=-1)
    assert single[0] > 20 and tutorial[0] > 0.9 * single[1] and 0 < hasselt[0] < hasselt[1] < 2
    single, tutorial, hasselt = low_high("value", "noisy", minus=-1)
    assert 0 < single[0] < single[1] < 1 and hasselt[1] < -1  # too low, and the furthest off
    for key in ("reward", "best_share"):
        single, tutorial, hasselt = low_high(key, "noisy")
        assert hasselt[0] > single[1]
    single, tutorial, _ = low_high("reward", "noisy")
    assert single[0] > tutorial[1]


def test_mean_band_and_table_by_hand():
    mean, half = gq.mean_band([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0], [7.0, 2.0]])
    deviation = (20 / 3) ** 0.5  # of 1, 3, 5, 7
    np.testing.assert_allclose(mean, [4, 2])
    np.testing.assert_allclose(half, [1.96 * deviation / 2, 0])
    row = {"world": "w", "learner": "l", "true_value": -1.0, "value": [1.0, 3.0, 5.0, 7.0]}
    row |= {"reward": [0.5] * 4, "best_share": [0.2, 0.4, 0.2, 0.4]}
    spans = []
    for since in ([9, None, 3, 5], [None] * 4, [*range(1, 100), None]):
        line = gq.comparison_table([row | {"best_since": since}]).splitlines()[-1]
        spans.append([cell.strip() for cell in line.strip("|").split("|")])
    assert spans[0][:5] == ["w", "l", "0.500 ± 0.000", "5 (3 to never)", "1"]
    assert spans[0][5:] == ["30.0 ± 11.3", "+5.00 ± 2.53"]
    assert spans[1][3:5] == ["never", "4"]
    # of 100 the ranks 40 and 61 bound the median with at least 95 % (binomial: 96.5 %)
    assert spans[2][3:5] == ["50 (40 to 61)", "1"]


def test_cli_compare_saves_figure_and_numbers_and_prints_their_table(tmp_path, monkeypatch, capsys):
    figures = []

    class Spy(gq.Figure):
        def savefig(self, *args, **kwargs):
            figures.append(self)
            super().savefig(*args, **kwargs)

    monkeypatch.setattr(gq, "Figure", Spy)
    gq.main(f"--compare --seeds 2 --seed 5 --episodes 9 --gamma 0.8 --out {tmp_path}".split())
    files = ["grid_compare.json", "grid_compare.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    rows = json.loads((tmp_path / "grid_compare.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert gq.comparison_table(rows) in printed and printed.count("\n|") == 2 + 9
    names = ("Q-learning", "tutorial's rule", "van Hasselt's rule")
    pairs = list(itertools.product(gq.WORLDS, names))
    assert [(row["world"], row["learner"]) for row in rows] == pairs
    epsilons = [0.1] * 6 + [1.0] * 3
    for row, epsilon in zip(rows, epsilons, strict=True):
        assert (row["seeds"], row["episodes"]) == ([5, 6], 9)
        assert row["settings"] == SETTINGS | {"gamma": 0.8, "epsilon": epsilon}
    assert imread(tmp_path / "grid_compare.png").shape[1] > 1000
    (figure,) = figures
    curves = [line for ax in figure.axes for line in ax.lines if len(line.get_ydata()) == 9]
    assert [line.get_ydata().tolist() for line in curves] == [row["mean"] for row in rows]
    assert len({(line.get_color(), line.get_linestyle()) for line in curves}) == 3
    for ax in figure.axes:
        assert ax.get_xlabel() == "episode" and ax.get_ylabel() and ax.get_title()
        assert {tuple(line.get_ydata()) for line in ax.lines[1::2]} <= {(-1, -1), (1, 1)}


def test_a_failed_comparison_leaves_earlier_files_whole(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    files = [tmp_path / "grid_compare.json", tmp_path / "grid_compare.png"]
    for path in files:
        path.write_bytes(b"earlier")
    monkeypatch.setattr(gq.os, "replace", full)
    with pytest.raises(SystemExit) as stop:
        gq.main(f"--compare --seeds 2 --episodes 2 --out {tmp_path}".split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "No space" in error
    assert sorted(tmp_path.iterdir()) == files
    assert {path.read_bytes() for path in files} == {b"earlier"}


# --- Command line --------------------------------------------------------------------------------

FLAGS_AND_FILES = [
    ([], "grid_q.png"),
    (["--double"], "grid_double_tutorial.png"),
    (["--double", "tutorial"], "grid_double_tutorial.png"),
    (["--double", "hasselt"], "grid_double_hasselt.png"),
]


@pytest.mark.parametrize(("flags", "name"), FLAGS_AND_FILES)
def test_cli_prints_arrows_and_saves_a_readable_figure(flags, name, tmp_path, capsys):
    out = tmp_path / "made" / "here"
    gq.main([*flags, "--episodes", "300", "--seed", "4", "--out", str(out)])
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and rows[0].count("end") == 1
    assert sum(letter in gq.ARROWS for row in rows for letter in row) == 8
    assert "Greedy return from the start: -1 (best: -1)\n" in printed.out
    assert "does not\nvisit every corner often enough" in printed.out
    assert printed.err == ""
    assert [path.name for path in out.iterdir()] == [name]
    picture = imread(out / name)  # (height, width, 4) float32
    assert picture.shape[0] > 500 and picture.shape[1] > 1000 and picture.std() > 0.05


def test_cli_without_out_writes_to_runs_grid_and_repeats_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = []
    for _ in range(2):
        gq.main(["--episodes", "20"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / "runs" / "grid" / "grid_q.png"]


def test_cli_flags_reach_the_agent(tmp_path, monkeypatch):
    seen = []

    def spy(agent, episodes):
        seen.append((agent, episodes))
        return agent, np.full(episodes, -1.0), np.ones((9, 8), dtype=int)

    monkeypatch.setattr(gq, "train_agent", spy)
    numbers = "--episodes 7 --alpha 0.3 --gamma 0.8 --epsilon 0.2 --seed 9 --copy-steps 12".split()
    for double in ([], ["--double"], ["--double", "hasselt"]):
        gq.main([*double, *numbers, "--out", str(tmp_path)])
    assert [type(agent) for agent, _ in seen] == LEARNERS
    for agent, episodes in seen:
        assert (agent.alpha, agent.gamma, agent.epsilon, episodes) == (0.3, 0.8, 0.2, 7)
        assert agent.rng.random() == rng(9).random()
    assert seen[1][0].copy_steps == 12


def test_cli_says_so_when_the_policy_does_not_reach_the_end(tmp_path, capsys):
    gq.main(["--episodes", "1", "--epsilon", "1", "--seed", "0", "--out", str(tmp_path)])
    assert "-100 (best: -1), cut off after 100 steps short of the end" in capsys.readouterr().out


def test_script_needs_no_display_and_prints_arrows_in_any_locale(tmp_path):
    command = [sys.executable, gq.__file__, "--episodes", "50", "--out", "pictures"]
    surroundings = {**os.environ, "PYTHONIOENCODING": "ascii", "MPLBACKEND": "tkagg"}
    surroundings.pop("DISPLAY", None)
    result = subprocess.run(
        command, cwd=tmp_path, env=surroundings, capture_output=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert "↗" in result.stdout.decode("utf-8")
    assert imread(tmp_path / "pictures" / "grid_q.png").ndim == 3


def test_importing_leaves_the_choice_of_backend_alone():
    code = "import sys, grid_qlearning; sys.exit('matplotlib.pyplot' in sys.modules)"
    folder = Path(gq.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=folder, timeout=60).returncode == 0


BAD_INPUT = [
    ("--episodes -5", "--episodes", "whole number from 1"),
    ("--episodes 0", "--episodes", "whole number from 1"),
    ("--episodes 2.5", "--episodes", "whole number from 1"),
    ("--episodes many", "--episodes", "whole number from 1"),
    ("--episodes 99999999999999", "--episodes", "to 1000000"),
    ("--alpha 0", "--alpha", "above 0 and at most 1"),
    ("--alpha -0.1", "--alpha", "above 0 and at most 1"),
    ("--alpha 1.01", "--alpha", "above 0 and at most 1"),
    ("--alpha nan", "--alpha", "above 0 and at most 1"),
    ("--alpha fast", "--alpha", "above 0 and at most 1"),
    ("--gamma -0.1", "--gamma", "from 0 to 1"),
    ("--gamma 1.5", "--gamma", "from 0 to 1"),
    ("--epsilon 2", "--epsilon", "from 0 to 1"),
    ("--epsilon inf", "--epsilon", "from 0 to 1"),
    ("--seed 1.5", "--seed", "whole number, 0 or above"),
    ("--seed -1", "--seed", "whole number, 0 or above"),
    ("--seed x", "--seed", "whole number, 0 or above"),
    ("--copy-steps 0", "--copy-steps", "whole number from 1"),
    ("--double --copy-steps 1.5", "--copy-steps", "whole number from 1"),
    ("--double foo", "--double", "tutorial"),
    ("--double foo", "--double", "hasselt"),
    ("--seed", "--seed", "expected one argument"),
    ("--seeds 5", "--seeds", "only with --compare"),
    ("--compare --seeds 1", "--seeds", "whole number from 2"),
    ("--compare --seeds many", "--seeds", "whole number from 2"),
    ("--compare --double", "--compare", "--double"),
    ("--double hasselt --compare", "--compare", "--double"),
    ("--compare --alpha 0", "--alpha", "above 0 and at most 1"),
    ("--compare --out a_file", "--out", "name a folder"),
    ("--sneed 3", "--sneed", "unrecognized"),
    ("--out a_file", "--out", "name a folder"),
    ("--out a_file/below", "--out", "name a folder"),
    ("--out taken", "--out", "name a folder"),  # a folder stands where the figure should go
]


@pytest.mark.parametrize(("line", "flag", "hint"), BAD_INPUT)
def test_bad_input_gives_one_line_and_writes_nothing(
    line, flag, hint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("mine")
    Path("taken/grid_q.png").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        gq.main(line.split())
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    assert flag in printed.err and hint in printed.err
    assert sorted(tmp_path.rglob("*")) == before and Path("a_file").read_text() == "mine"


def test_bad_input_to_the_script_shows_no_traceback(tmp_path):
    command = [sys.executable, gq.__file__, "--alpha", "two\nlines"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "--alpha" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_earlier_figure_whole(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    figure = tmp_path / "grid_q.png"
    figure.write_bytes(b"earlier")
    with monkeypatch.context() as patch:
        patch.setattr(gq.os, "replace", full)
        with pytest.raises(SystemExit) as stop:
            gq.main(["--episodes", "5", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.err.count("\n") == 1 and "No space" in printed.err
    assert list(tmp_path.iterdir()) == [figure] and figure.read_bytes() == b"earlier"
    gq.main(["--episodes", "5", "--out", str(tmp_path)])
    assert imread(figure).ndim == 3  # and a run that works replaces it
