"""Sections 3 and 4 of mario_ddqn.py, network and agent: targets, losses and weights by hand, and tasks whose Q-values
are known, each of which isolates one fault. States are 36×36 here, the smallest that the three convolutions take."""
from collections import Counter
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import m, same
from torch import nn

from mario_ddqn import RULES, DQNAgent, DQNSolver, Settings

SHAPE = (4, 36, 36)


def make_agent(n_actions=3, **changes):
    """An agent with plain settings: one game, one step, no scale, uniform replay."""
    settings = Settings(**{"envs": 1, "n_step": 1, "gamma": 0.9, "reward_scale": 1.0, "priority": 0.0, "memory": 1000,
                           "learn_start": 8, "batch": 8, "bfloat16": False, **changes})
    return DQNAgent(settings, SHAPE, n_actions)


def filled_agent(**changes):
    """With 40 transitions of noise in its memory, in episodes of 10; its target network differs from the local one,
    and no copy is due in the next update."""
    agent, rng = make_agent(**changes), np.random.default_rng(1)
    for _ in range(4):
        frames = np.concatenate([np.zeros((3, 36, 36)), rng.integers(0, 256, (11, 36, 36)) / 255]).astype(np.float32)
        for t in range(10):
            agent.remember(frames[t:t + 4], int(rng.integers(3)), float(rng.normal(0, 2)), frames[t + 1:t + 5], t == 9)
    agent.updates = 1
    with torch.no_grad():
        for weight in agent.target_net.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    return agent


class Table(nn.Module):
    """A network whose Q-values are known: the newest frame of the state says which row (0 or 1)."""

    def __init__(self, *rows):
        super().__init__()
        self.q = nn.Parameter(torch.tensor(rows, dtype=torch.float32))

    def forward(self, x):
        return self.q[x[:, -1, 0, 0].round().long()]


LOCAL, TARGET = ((1.0, 5.0, 2.0), (0.0, -1.0, 3.0)), ((10.0, 20.0, 30.0), (7.0, 8.0, -9.0))
NEXT_VALUE = {"single": (5.0, 3.0), "tutorial": (30.0, 8.0), "hasselt": (20.0, -9.0)}


def rows_as_states(*rows):
    return torch.tensor(rows, dtype=torch.float32)[:, None, None, None].expand(-1, *SHAPE).contiguous()


def table_agent(**changes):
    """Its states are black or white, its networks are tables; 40 episodes of one step, with rewards 0 to 9."""
    agent = make_agent(**{"double": "tutorial", "gamma": 0.05, "learn_start": 32, "batch": 64, **changes})
    agent.updates, agent.local_net, agent.target_net = 1, Table(*LOCAL), Table(*TARGET)
    for k in range(40):
        state, next_state = (rows_as_states(row)[0].numpy() for row in (k % 2, int(k % 3 > 0)))
        agent.remember(state, k % 3, k % 10, next_state, k % 4 == 0, k % 4 != 0)
    return agent


def huber(error):
    """0.5 x² within ±1, |x| − 0.5 beyond."""
    return torch.where(error.abs() < 1, 0.5 * error ** 2, error.abs() - 0.5)


def errors(rule, local, target, batch):
    """Q(s, a) − target for every transition of the batch."""
    state, action, reward, next_state, terminal, discount = batch
    values = (local if rule == "single" else target)(next_state)
    best = local(next_state).argmax(1) if rule == "hasselt" else values.argmax(1)
    goal = reward + discount * values[range(len(action)), best] * (1 - terminal)
    return local(state)[range(len(action)), action] - goal.detach()


def spy_on(agent):
    """(batches, gradients): lists into which every batch that is recalled, and every gradient that is used, goes."""
    batches, gradients, recall = [], [], agent.recall
    agent.recall = lambda: batches.append(recall()) or batches[-1]
    agent.optimizer.register_step_pre_hook(
        lambda *_: gradients.append([weight.grad.clone() for weight in agent.local_net.parameters()]))
    return batches, gradients


# ===== Targets, losses, weights

@pytest.mark.parametrize("rule", RULES)
def test_td_target_by_hand(rule):
    """Going on with γ and with γ⁵, and a terminal step, whose target is the reward alone."""
    agent, (first, second) = make_agent(double=rule), NEXT_VALUE[rule]
    agent.local_net, agent.target_net = Table(*LOCAL), Table(*(LOCAL if rule == "single" else TARGET))
    target = agent.td_target(torch.tensor([1.0, -2.0, 4.0, 0.5]), rows_as_states(0, 1, 0, 1),
                             torch.tensor([0.0, 0.0, 1.0, 0.0]), torch.tensor([0.9, 0.9, 0.9, 0.9 ** 5]))
    expected = [1 + 0.9 * first, -2 + 0.9 * second, 4.0, 0.5 + 0.9 ** 5 * second]
    np.testing.assert_allclose(target.detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_no_gradient_flows_through_the_target(rule):
    agent = filled_agent(double=rule, n_step=3, batch=16)
    agent.experience_replay()  # of whose gradients nothing may be left in the next update
    local, target, (batches, gradients) = deepcopy(agent.local_net), deepcopy(agent.target_net), spy_on(agent)
    agent.experience_replay()
    loss = huber(errors(rule, local, target, batches[0])).mean()
    expected = torch.autograd.grad(loss, list(local.parameters()))
    assert agent.learnt[1][0] == pytest.approx(loss.item(), rel=1e-5) and len(gradients[0]) == 10
    for gradient, by_hand in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(gradient, by_hand, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_learns_what_float32_learns_and_is_used_where_the_processor_has_it(rule, monkeypatch):
    """The target's pass must not leave weights behind that the learning pass takes for constants."""
    gradients = []
    for asked, *processor in ([True], [False, "amx_bf16"], [True, "amx_bf16"], [True, "avx512_bf16"]):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=processor: dict.fromkeys(has, True))
        agent = filled_agent(double=rule, batch=16, bfloat16=asked)
        gradients.append(spy_on(agent)[1])
        agent.experience_replay()
        assert agent.bf16 == (asked and processor != [])
    for exact, rough in zip(gradients[0][0], gradients[-1][0], strict=True):
        assert rough.dtype == torch.float32 and 0 < (exact - rough).norm() < 0.5 * exact.norm()


@pytest.mark.parametrize("priority", [0.0, 0.5])
def test_the_loss_is_the_weighted_mean_of_hubers_and_priorities_follow_the_errors(priority):
    """Weights (chance over uniform chance)^-0.4 over their maximum; afterwards p = (|δ| + 0.01)^priority."""
    agent = table_agent(priority=priority, reward_scale=0.5)
    memory, (batches, _), taken = agent.memory, spy_on(agent), agent.memory.priority > 0
    memory.priority[taken] = np.random.default_rng(3).uniform(0.2, 4, 40) if priority else 1
    before, drawn = memory.priority.copy(), np.zeros_like(taken)
    agent.experience_replay()
    error, p = errors("tutorial", Table(*LOCAL), Table(*TARGET), batches[0]).abs().detach(), before[memory.drawn]
    weight = torch.from_numpy((p / before[taken].mean()) ** -0.4)
    loss = (weight / weight.max() * huber(error)).mean().item()
    state, action, reward, next_state, terminal, discount = batches[0]
    mean_q = Table(*LOCAL)(state)[range(64), action].mean().item()
    assert agent.learnt == [pytest.approx((loss, mean_q), rel=1e-4)] and error.min() < 1 < error.max()
    np.testing.assert_allclose(memory.priority[memory.drawn], (error.numpy() + 0.01) ** priority, rtol=1e-4)
    drawn[memory.drawn] = True
    assert np.array_equal(memory.priority[~drawn], before[~drawn]) and not drawn[~taken].any()
    rows = zip(state[:, 3, 0, 0], action, reward, next_state[:, 3, 0, 0], terminal, strict=True)
    assert {tuple(map(float, row)) for row in rows} <= {  # what it recalls is what was remembered
        (k % 2, k % 3, 0.5 * (k % 10), int(k % 3 > 0), int(k % 4 == 0)) for k in range(40)}
    assert state.shape == next_state.shape == (64, *SHAPE) and state.dtype == next_state.dtype == torch.float32


# ===== When it learns and copies, ε, the learning rate

@pytest.mark.parametrize("rule", ["tutorial", "hasselt"])
def test_the_target_is_copied_every_copy_every_updates_and_at_no_other_time(rule):
    agent, before, used = filled_agent(double=rule, copy_every=3, lr=1e-3), [], []
    agent.updates, td_target = 0, agent.td_target
    agent.td_target = lambda *batch: used.append(deepcopy(agent.target_net.state_dict())) or td_target(*batch)
    for k in range(8):
        before.append(deepcopy(agent.local_net.state_dict()))
        agent.experience_replay()
        assert agent.updates == k + 1 and same(used[k], before[k - k % 3])  # the update itself uses the new copy
        assert same(dict(agent.target_net.state_dict()), used[k]) and not same(agent.local_net.state_dict(), before[k])


def test_there_is_no_update_before_there_is_enough_to_learn_from():
    agent, state = make_agent(learn_start=20, n_step=3), np.zeros(SHAPE, np.float32)
    for k in range(1, 41):
        agent.remember(state, 0, 0.0, state, False)
        agent.experience_replay()
        assert agent.updates == max(0, k - 21) == len(agent.learnt)  # two wait for their n steps


def test_epsilon_follows_the_tutorials_schedule_once_per_update():
    agent, schedule = DQNAgent(Settings(**m.PRESETS["tutorial"])), []
    for agent.updates in range(1000):
        schedule.append(agent.epsilon)
    np.testing.assert_allclose(schedule[:390], 0.99 ** np.arange(390))
    assert schedule[0] == 1.0 and 0.02 < schedule[389] < 0.02006 and set(schedule[390:]) == {0.02}
    agent = filled_agent(eps_decay=0.5, eps_min=0.15)
    for expected in (0.5, 0.25, 0.15, 0.15):
        agent.act(np.zeros((1, *SHAPE), np.float32))
        assert agent.epsilon == pytest.approx(expected)
        agent.experience_replay()


@pytest.mark.parametrize("steps, rates", [(16, [1.6e-3, 8e-4, 4e-4, 2e-4, 1e-4, 1e-4]), (0, [1.6e-3] * 6)])
def test_the_learning_rate_falls_by_the_same_factor_until_the_last_step(steps, rates):
    agent, seen = filled_agent(lr=1.6e-3, lr_end=1e-4, steps=steps, train_every=4), []
    agent.optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    for _ in rates:
        agent.experience_replay()
    np.testing.assert_allclose(seen, rates)


# ===== Acting, seeds, the network

@pytest.mark.parametrize("epsilon", [0.0, 0.4, 1.0])
def test_act_explores_with_probability_epsilon_uniformly_and_is_greedy_otherwise(epsilon):
    agent = make_agent(5, envs=2, eps_decay=epsilon, eps_min=0.0)
    agent.updates = 1  # ε is eps_decay to the power of the updates
    agent.local_net, agent.target_net = Table((0, 1, 2, 9, 3), (5, 1, 2, 3, 4)), Table((9, 0, 0, 0, 0), (0, 9, 0, 0, 0))
    actions = np.stack([agent.act(rows_as_states(0, 1).numpy()) for _ in range(2000)])
    assert actions.shape == (2000, 2) and actions.dtype == np.int64
    counts = np.array([np.bincount(column, minlength=5) for column in actions.T])
    expected = 2000 * (epsilon / 5 + (1 - epsilon) * (np.arange(5) == [[3], [0]]))
    can = expected > 0
    assert not counts[~can].any() and ((counts - expected)[can] ** 2 / expected[can]).sum() < 35
    if epsilon == 0.4:  # the games begin to explore independently: (0.4 · 4 / 5)² of the steps are not greedy in both
        assert 0.07 < (actions != [3, 0]).all(1).mean() < 0.14
    if epsilon == 1:  # and choose independently
        pairs = Counter(map(tuple, actions.tolist()))
        assert len(pairs) == 25 and max(pairs.values()) < 130


def test_the_seed_decides_weights_actions_and_batches_and_touches_no_other_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, other = (filled_agent(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    state = np.zeros((1, *SHAPE), np.float32)
    told = [(list(agent.local_net.parameters()), [agent.act(state).tolist() for _ in range(30)], agent.recall())
            for agent in (one, again, other)]
    assert same(told[0], told[1]) and not any(map(same, told[0], told[2]))


def test_the_network_is_the_tutorials():
    net = DQNSolver((4, 84, 84), 5)
    layers = [layer for layer in net.modules() if not list(layer.children()) and not isinstance(layer, nn.Flatten)]
    assert [type(layer).__name__ for layer in layers] == ["Conv2d", "ReLU"] * 3 + ["Linear", "ReLU", "Linear"]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding) for c in layers[0:6:2]] == [
        (4, 32, (8, 8), (4, 4), (0, 0)), (32, 64, (4, 4), (2, 2), (0, 0)), (64, 64, (3, 3), (1, 1), (0, 0))]
    assert [(layer.in_features, layer.out_features) for layer in layers[6::2]] == [(3136, 512), (512, 5)]
    assert net(torch.rand(3, 4, 84, 84)).shape == (3, 5)


# ===== Tasks whose Q-values are known

BRIGHT, DARK = 220, 40


def state_of(*shades):
    """The state after frames of these colours since the start."""
    return np.stack([np.full(SHAPE[1:], shade, np.float32) for shade in ([0, 0, 0, *shades])[-4:]]) / np.float32(255)


PROBES = {  # actions, colours (None: either), reward(t, colour, action), {colours so far: Q-values}, updates
    "one action, one step, reward 1": (1, [DARK] * 2, lambda *_: 1.0, {(DARK,): [1.0]}, 60),
    "the reward depends on the state": (1, [None] * 2, lambda t, c, a: 1.0 if c == BRIGHT else -1.0,
                                        {(BRIGHT,): [1.0], (DARK,): [-1.0]}, 100),
    "the reward comes one step later": (1, [DARK, BRIGHT, DARK], lambda t, c, a: float(t == 1),
                                        {(DARK,): [0.5], (DARK, BRIGHT): [1.0]}, 150),
    "the reward depends on the action": (2, [DARK] * 2, lambda t, c, a: (-1.0, 1.0)[a], {(DARK,): [-1.0, 1.0]}, 80),
    "the reward depends on state and action": (2, [None] * 2, lambda t, c, a: 1.0 if (c == BRIGHT) == a else -1.0,
                                               {(BRIGHT,): [-1.0, 1.0], (DARK,): [1.0, -1.0]}, 160),
}


@pytest.mark.parametrize("name, rule", [*((name, "tutorial") for name in PROBES), (list(PROBES)[2], "single"),
                                        *((name, "hasselt") for name in list(PROBES)[2:])])
def test_the_agent_learns_the_known_q_values(name, rule):
    n_actions, colours, reward, known, updates = PROBES[name]
    agent = make_agent(n_actions, double=rule, gamma=0.5, lr=1e-3, lr_end=1e-3, batch=16, copy_every=5, eps_decay=1.0,
                       learn_start=32, seed=1)
    rng = np.random.default_rng(0)
    while agent.updates < updates:
        shades = [colour or int(rng.choice([DARK, BRIGHT])) for colour in colours]
        states = [state_of(*shades[:t]) for t in range(1, len(shades) + 1)]
        for t, (state, next_state) in enumerate(zip(states, states[1:], strict=False)):
            action = int(agent.act(state[None])[0])
            agent.remember(state, action, reward(t, shades[t], action), next_state, t == len(states) - 2)
            agent.experience_replay()
    learnt = agent.q_values(np.stack([state_of(*shades) for shades in known]))
    np.testing.assert_allclose(learnt, list(known.values()), atol=0.05)
