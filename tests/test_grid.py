"""What grid_qlearning.py and benchmarks/grid_compare.py promise. The oracle is value iteration."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grid_compare as gc
import numpy as np
import pytest
from conftest import ROOT
from matplotlib.image import imread

import grid_qlearning as gq
from grid_qlearning import Agent, AgentDoubleQ, AgentHasselt, Grid

COMMITTED = json.loads((ROOT / "results" / "grid_compare.json").read_text(encoding="utf-8"))
MOVES = {"↑": (0, 1), "↗": (1, 1), "→": (1, 0), "↘": (1, -1), "↓": (0, -1), "↙": (-1, -1), "←": (-1, 0), "↖": (-1, 1)}
CENTRE, CORNER = 4, 8  # a square one move from the end; the corner at bottom right
every_learner = pytest.mark.parametrize("learner", [Agent, AgentDoubleQ, AgentHasselt])


def rng(seed=0):
    return np.random.default_rng(seed)


class Coin:
    """Stands in for a Generator: random() gives the same number each time."""
    def __init__(self, number):
        self.random = lambda: number


# ===== Grid
def test_every_move_goes_where_its_arrow_points_and_stays_at_the_edge():
    assert (Grid.start, Grid.end) == (6, 2) and sorted(gq.ARROWS) == sorted(MOVES)
    for state, action in np.ndindex(9, 8):
        right, up = state % 3, 2 - state // 3  # column from the left, row from the bottom
        there = right + MOVES[gq.ARROWS[action]][0], up + MOVES[gq.ARROWS[action]][1]
        new_right, new_up = there if {*there} <= {0, 1, 2} else (right, up)
        at_end = (new_right, new_up) == (2, 2)
        assert Grid().step(state, action) == (3 * (2 - new_up) + new_right, 0 if at_end else -1, at_end)


def test_known_paths_return_what_the_tutorial_says_and_a_circle_is_cut_off():
    for moves, squares, total in ("→→↑↑", [6, 7, 8, 5, 2], -3), ("↗↗", [6, 4, 2], -1):
        policy = dict(zip(squares, map(gq.ARROWS.index, moves), strict=False))
        assert gq.greedy_path(policy) == (squares, total)
    assert gq.greedy_path(np.zeros(9, dtype=int), max_steps=4) == ([6, 3, 0, 0, 0], -4)  # up, and up against the edge


# ===== Learning against the oracle

@every_learner
def test_all_100_seeds_learn_the_best_path(learner):
    for seed in range(100):
        agent, _, _ = gq.train_agent(learner(rng(seed)), episodes=500)
        assert gq.greedy_path(agent.best_policy()) == ([Grid.start, CENTRE, Grid.end], -1)


@every_learner
def test_the_whole_table_matches_the_oracle_if_every_pair_is_visited(learner):
    agent = learner(rng(), epsilon=1.0)
    gq.run_episodes(agent, Grid(), 1500)
    oracle = gc.optimal_values(gq.GAMMA)
    oracle[Grid.end] = 0  # the episode is over there, nothing is learnt
    np.testing.assert_allclose(agent.action_values(), oracle, atol=1e-2)


def test_of_the_three_rules_only_van_hasselts_is_free_of_the_maximums_bias():
    """Two states: each move from 0 leads to 1, each move from 1 to the end with a reward of mean 0."""
    class Lottery:
        start, noise = 0, rng(1)

        def step(self, state, action):
            return (1, 0.0, False) if state == 0 else (Grid.end, self.noise.normal(), True)

    values = np.zeros((3, 40))  # of state 0, whose true value is 0; every 100 episodes
    for learner, row in zip((Agent, AgentDoubleQ, AgentHasselt), values, strict=True):
        agent, grid = learner(rng(2), epsilon=1.0), Lottery()
        for i in range(len(row)):
            gq.run_episodes(agent, grid, 100)
            row[i] = agent.action_values(0).mean()
    single, tutorial, hasselt = values[:, 10:].mean(axis=1)
    assert single > 0.2 and tutorial > 0.2 and abs(hasselt) < 0.05


# ===== One update at a time
ROW_A, ROW_B = [-9, -5, -3, -4, -7, -6, -8, -10], [-1, -5, -6, -4, -7, -2, -8, -10]


@pytest.mark.parametrize("learner, coin, second, expected", [  # α = 0.5, γ = 0.9
    (Agent, None, None, [-2.85]),  # max of A: target -1 + 0.9 * -3 = -3.7;  -2 + 0.5 * (-3.7 + 2)
    (AgentDoubleQ, None, "q_target", [-1.95, -4]),  # max of the copy B: target -1 + 0.9 * -1;  -2 + 0.5 * 0.1
    (AgentHasselt, 0.5, "q_other", [-4.2, -4]),  # A picks action 2, B values it: -1 + 0.9 * -6;  -2 + 0.5 * -4.4
    (AgentHasselt, 0.4999, "q_other", [-2, -6.55]),  # B picks action 0, A: -1 + 0.9 * -9;  -4 + 0.5 * -5.1
])
def test_hand_computed_updates(learner, coin, second, expected):
    agent = learner(Coin(coin), alpha=0.5, gamma=0.9)
    tables = [agent.q_table, getattr(agent, second)] if second else [agent.q_table]
    for table, row, value in zip(tables, (ROW_A, ROW_B), (-2, -4), strict=False):
        table[4], table[3, 2] = row, value
    wanted = [table.copy() for table in tables]
    for table, value in zip(wanted, expected, strict=True):
        table[3, 2] = value
    agent.q_update(3, 2, -1.0, 4, False)
    np.testing.assert_allclose(tables, wanted, rtol=1e-12)


@every_learner
def test_the_future_is_left_out_at_the_end_but_not_when_the_steps_run_out(learner):
    agent = learner(Coin(0.9), alpha=0.5, gamma=0.5, epsilon=0.0)
    for name in {"q_table", "q_target", "q_other"} & set(vars(agent)):
        getattr(agent, name)[:] = -8
    agent.q_update(1, 2, -2.0, Grid.end, True)
    assert agent.q_table[1, 2] == -8 + 0.5 * (-2 - -8)
    agent.rng, agent.alpha = rng(), 1.0
    returns, visits = gq.run_episodes(agent, Grid(), episodes=1, max_steps=1)
    assert (returns.tolist(), visits.sum()) == ([-1], 1)
    assert agent.q_table[Grid.start].max() == -1 + 0.5 * -8


def test_q_target_is_refreshed_exactly_every_copy_steps_steps():
    agent, expected = AgentDoubleQ(rng(), copy_steps=3), np.zeros((9, 8))
    for step in range(1, 12):
        agent.q_update(step % 9, step % 8, -1.0, (step + 1) % 9, step % 4 == 0)  # an episode's end makes no difference
        expected = agent.q_table.copy() if step in (3, 6, 9) else expected
        np.testing.assert_array_equal(agent.q_target, expected, err_msg=f"after step {step}")


# ===== Acting and training
@every_learner
def test_act_and_best_policy_pick_the_best_action_and_act_draws_among_ties_and_explores(learner):
    agent, best = learner(rng(), epsilon=0.0), [3, 1, 4, 1, 5, 2, 6, 5, 0]
    agent.q_table[range(9), best] = 1
    assert [agent.act(state) for state in range(9)] == agent.best_policy().tolist() == best
    agent.q_table[CORNER, [3, 6]] = 1
    picks = np.bincount([agent.act(CORNER) for _ in range(3000)], minlength=8)
    assert np.flatnonzero(picks).tolist() == [0, 3, 6] and picks[[0, 3, 6]].min() > 850
    agent.epsilon = 0.4
    share = np.bincount([agent.act(CENTRE) for _ in range(8000)], minlength=8) / 8000
    assert share == pytest.approx(np.full(8, 0.4 / 8) + 0.6 * np.eye(8)[5], abs=0.02)


def test_van_hasselts_learner_acts_on_the_mean_of_both_tables():
    agent = AgentHasselt(rng(), epsilon=0.0)
    agent.q_table[CORNER], agent.q_other[CORNER] = -8, -8
    agent.q_table[CORNER, [1, 3]], agent.q_other[CORNER, [2, 3]] = (-1, -2), (-1, -2)
    assert agent.act(CORNER) == 3 == agent.best_policy()[CORNER] and agent.action_values(CORNER)[3] == -2


def test_agents_refuse_settings_out_of_range():
    for wrong in {"alpha": 0}, {"alpha": 1.1}, {"gamma": -0.1}, {"gamma": 2}, {"epsilon": 1.5}, {"epsilon": -1}:
        with pytest.raises(ValueError, match="need"):
            AgentDoubleQ(rng(), **wrong)


@every_learner
def test_the_seed_decides_everything_and_returns_and_visits_count_what_happened(learner):
    given = learner(rng(11)) if learner is AgentHasselt else None
    train = gq.train_agent if learner is Agent else gq.train_agent_doubleq
    agent, returns, visits = train(given, seed=11)
    same = learner(rng(11))
    gq.run_episodes(same, Grid(), 2000)
    assert type(agent) is learner and np.array_equal(agent.q_table, same.q_table)
    assert (returns.shape, visits.shape) == ((2000,), (9, 8)) and returns.max() == gq.BEST_RETURN
    # no episode is cut short here: each ends with the one step that costs nothing
    assert visits.sum() == 2000 - returns.sum() and visits[Grid.end].sum() == 0


# ===== Figure and text
def test_normalised_average_is_best_return_over_rolling_mean_and_1000_episodes_are_drawn():
    np.testing.assert_allclose(gq.normalised_average(np.array([-1.0, -3, -1, -1, -4]), window=2), [1, 0.5, 0.5, 1, 0.4])
    ax = gq.Figure().subplots()
    gq.plot_rewards(ax, np.full(1500, -2.0))
    assert ax.lines[0].get_xdata()[[0, -1]].tolist() == [1, 1000] and set(ax.lines[0].get_ydata()) == {0.5}


def test_text_and_picture_mark_the_squares_seldom_seen():
    visits, policy, ax = np.full((9, 8), 100), np.array([0, 1, 2, 3, 4, 5, 6, 7, 0]), gq.Figure().subplots()
    visits[0], visits[8] = 0, [gq.FEW_VISITS - 1, 0, 0, 0, 0, 0, 0, 0]
    rows = [[cell.split() for cell in row.strip("|").split("|")] for row in gq.policy_text(policy, visits).splitlines()]
    assert rows == [[["↑", "0?"], ["↗", "800"], ["end"]], [["↘", "800"], ["↓", "800"], ["↙", "800"]],
                    [["←", "800"], ["↖", "800"], ["↑", "199?"]]]
    gq.plot_policy(ax, policy, visits)
    assert [text.get_alpha() for text in ax.texts if text.get_text() in MOVES] == [0.2, *[1] * 6, 0.995]


# ===== Comparison
def test_noise_is_minus_12_or_10_evenly_and_never_at_the_end():
    grid = gc.NoisyGrid(11, rng(5))
    rewards, ends = ([grid.reward(square) for _ in range(2000)] for square in (CENTRE, Grid.end))
    assert set(rewards) == {-12, 10} and 900 < rewards.count(10) < 1100 and set(ends) == {0}  # standard deviation 22


@pytest.mark.parametrize("rule, noise", [(None, 0), ("tutorial", 11), ("hasselt", 0)])
def test_a_run_of_the_comparison_is_an_ordinary_training(rule, noise):
    run = gc.run_once(rule, noise, 0.1, 150, seed=4)
    agent, grid = gq.LEARNERS[rule](rng(4)), gc.NoisyGrid(noise, rng([4, 1]))
    returns, values, best = [], [], []
    for _ in range(150):
        _, visits = gq.run_episodes(agent, grid, 1)
        returns.append(1.0 - visits.sum())  # without the noise
        values.append(agent.action_values(Grid.start).max())
        best.append(gq.greedy_path(agent.best_policy())[0] == [Grid.start, CENTRE, Grid.end])
    since = next((episode for episode in range(1, 151) if all(best[episode - 1:])), None)
    assert (run["best_since"], run["value"]) == (since, values[-1]) and since != 1
    assert (run["reward"], run["best_share"]) == pytest.approx((-150 / sum(returns), sum(best) / 150))
    np.testing.assert_allclose(run["curve"], values if noise else gq.normalised_average(np.array(returns)))


def test_the_comparison_repeats_its_committed_numbers_whatever_the_number_of_workers():
    for old, new in zip(COMMITTED, gc.compare(range(2), workers=2), strict=True):
        assert old["seeds"] == list(range(200)) and len(old["reward"]) == 200
        assert old["world"] != "plain" or np.allclose(old["value"], -1, atol=1e-2)  # the true value of the start
        assert all(old[key] == new[key] for key in ("world", "learner", "episodes", "epsilon", "true_value"))
        assert all(old[key][:2] == new[key] for key in ("reward", "best_since", "best_share", "value"))
    assert gc.compare(range(3), episodes=9, workers=1) == gc.compare(range(3), episodes=9, workers=3)


def test_mean_band_and_table_by_hand():
    np.testing.assert_allclose(gc.mean_band([[1, 2], [3, 2], [5, 2], [7, 2]]), [[4, 2], [0.98 * (20 / 3) ** 0.5, 0]])
    row = {"world": "w", "learner": "l", "true_value": -1.0, "value": [1.0, 3.0, 5.0, 7.0], "reward": [0.5] * 4,
           "best_share": [0.2, 0.4, 0.2, 0.4], "best_since": [9, None, 3, 5]}
    assert gc.comparison_table([row]).splitlines()[-1] == (
        "| w | l | 0.500 ± 0.000 | 5 (3 to never) | 1 | 30.0 ± 11.3 | +5.00 ± 2.53 |")
    assert gc.median_span([None] * 4) == "never"
    # of 100 the ranks 40 and 61 bound the median with at least 95 % (binomial: 96.5 %)
    assert gc.median_span([*range(1, 100), None]) == "50 (40 to 61)"


# ===== Command line
def fails(main, flags, capsys):
    """The one line that it prints, after the program's name."""
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("grid_")
    return error.partition(": error: ")[2]


@pytest.mark.parametrize("flags, learner, name", [([], Agent, "q"), (["--double", "--copy-steps", "12"], AgentDoubleQ,
                         "double_tutorial"), (["--double", "hasselt"], AgentHasselt, "double_hasselt")])
def test_flags_reach_the_agent_and_the_result_is_printed_and_drawn(flags, learner, name, tmp_path, monkeypatch, capsys):
    agents, train = [], gq.train_agent
    monkeypatch.setattr(gq, "train_agent", lambda agent, episodes: agents.append(agent) or train(agent, None, episodes))
    gq.main(flags + f"--episodes 300 --alpha 0.3 --gamma 0.8 --epsilon 0.2 --seed 9 --out {tmp_path}/made/here".split())
    same = learner(rng(9), 0.3, 0.8, 0.2, *map(int, flags[2:]))
    gq.run_episodes(same, Grid(), 300)
    assert type(agents[0]) is learner and np.array_equal(agents[0].q_table, same.q_table)
    printed, picture = capsys.readouterr().out, imread(tmp_path / "made" / "here" / f"grid_{name}.png")
    assert sum(letter in MOVES for letter in printed) == 8 and "start: -1 (best: -1)\n" in printed
    assert picture.shape[0] > 500 and picture.shape[1] > 1000 and picture.std() > 0.05  # (height, width, 4) float32


def test_the_comparison_is_printed_and_saved_and_a_full_disk_leaves_earlier_files_whole(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(gc, "compare", lambda seeds: COMMITTED[:len(seeds)])
    gc.main(["--seeds", "9", "--out", str(tmp_path)])
    assert gc.comparison_table(COMMITTED) in capsys.readouterr().out
    assert json.loads((tmp_path / "grid_compare.json").read_text(encoding="utf-8")) == COMMITTED
    gq.main(["--episodes", "5", "--out", str(tmp_path)])
    earlier = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(gq.os, "replace", full)
    for main, flags in (gq.main, ["--episodes", 9]), (gc.main, ["--seeds", 9]):
        assert "No space" in fails(main, [*flags, "--out", tmp_path], capsys)
    assert len(earlier) == 3 and {path: path.read_bytes() for path in tmp_path.iterdir()} == earlier


@pytest.mark.parametrize("line, hint", [
    ("--episodes 0", "--episodes: 0 is not from 1"), ("--episodes 1" + "0" * 30, "--episodes"),
    ("--episodes 2.5", "invalid int value"), ("--seed -1", "--seed"), ("--seed 1" + "0" * 30, "--seed"),
    ("--alpha 0", "--alpha"), ("--gamma nan", "--gamma"), ("--double --copy-steps 1" + "0" * 30, "--copy-steps"),
    ("--copy-steps 50", "only with --double tutorial"), ("--double hasselt --copy-steps 50", "only with"),
    ("--double foo", "hasselt"), ("--sneed 3", "unrecognized"), ("--seed", "expected one argument"),
    ("--out a_file", "a_file"), ("--out taken", "taken")])  # a folder stands where the figure should go
def test_bad_input_gives_one_line_and_writes_nothing(line, hint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    Path("taken/grid_q.png").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert hint in fails(gq.main, line.split(), capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_display_and_no_utf_8_are_needed_and_output_to_a_full_disk_ends_in_one_line(tmp_path):
    poor = os.environ | dict(PYTHONIOENCODING="ascii", LC_ALL="C", MPLBACKEND="tkagg", DISPLAY="", PYTHONUNBUFFERED="")
    for flags, text in (["--episodes", "50"], "↗"), (["--help"], "--copy-steps"):
        done = subprocess.run([sys.executable, gq.__file__, *flags], cwd=tmp_path, env=poor, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"") and text in done.stdout.decode("utf-8")
    assert (tmp_path / "runs" / "grid" / "grid_q.png").exists()
    code = "import sys, grid_qlearning; sys.exit('matplotlib.pyplot' in sys.modules)"  # pyplot chooses a backend
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    for path in [gq.__file__, gc.__file__] if os.path.exists("/dev/full") else []:
        full = os.open("/dev/full", os.O_WRONLY)
        done = subprocess.run([sys.executable, path, "--out", tmp_path], env=poor, stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


@pytest.mark.parametrize("program, moment", [(gq, "imports"), (gq, "training"), (gc, "training")])
def test_ctrl_c_ends_in_one_line_and_exit_code_130(program, moment, tmp_path):
    if moment == "imports":  # a numpy that presses Ctrl-C
        (tmp_path / "numpy.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT); input()")
    flags = ["--out", tmp_path / "out", *(["--episodes", "1000000"] if program is gq else [])]
    process = subprocess.Popen([sys.executable, program.__file__, *flags], start_new_session=True, text=True,
                               env={**os.environ, "PYTHONPATH": str(tmp_path)}, stderr=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / "out").exists():
        time.sleep(0.05)
    if moment == "training":
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (130, f"{program.__name__}.py: stopped by Ctrl-C\n")
