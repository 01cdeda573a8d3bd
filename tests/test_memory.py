"""Section 4 of mario_ddqn.py, the replay memory. The oracle keeps whole float transitions and sums n steps plainly."""
from collections import Counter, deque
from itertools import islice, takewhile

import numpy as np
import pytest

from mario_ddqn import ReplayMemory, Settings


def colours(frames):
    """Frames of uint8 -> the float32 that ScaledFloatFrame makes of their stack."""
    return np.stack(frames).astype(np.float32) / np.float32(255)


def steps(rng, n_envs=2, go_on=0.75):
    """Endless play with frames (2, 2), as the arguments of push: emulators in random order, deaths and cut-offs."""
    stacks = [None] * n_envs
    while True:
        e, frame = int(rng.integers(n_envs)), rng.integers(0, 256, (2, 2), np.uint8)
        before = stacks[e] or [np.zeros((2, 2), np.uint8)] * 3 + [rng.integers(0, 256, (2, 2), np.uint8)]
        after, end = [*before[1:], frame], rng.choice(3, p=[go_on, 0.6 * (1 - go_on), 0.4 * (1 - go_on)])
        stacks[e] = None if end else after
        yield (colours(before), int(rng.integers(5)), float(rng.integers(-9, 9)), colours(after), bool(end == 1),
               bool(end == 2), e)


def filled(count, size=30, n_step=3, seed=0, **more):
    """A memory of two emulators after `count` steps, and the steps that follow."""
    memory, play = ReplayMemory(2 * size, 2, n_step, 0.5, (4, 2, 2)), steps(np.random.default_rng(seed), **more)
    for step in islice(play, count):
        memory.push(*step)
    return memory, play


class NaiveMemory:
    """For each emulator a row of places: one for each frame, with the whole transition that starts there, or None."""

    def __init__(self, size, n_envs):
        self.rows, self.over = [deque(maxlen=size) for _ in range(n_envs)], [True] * n_envs

    def push(self, *transition):
        *_, terminal, truncated, env = transition
        if self.over[env]:
            self.rows[env].extend([None] * 4)
        self.rows[env][-1] = transition
        self.rows[env].append(None)
        self.over[env] = terminal or truncated

    def transitions(self, n_step, gamma):
        """(state, action, return, next_state, terminal, discount) of all whose frames are there and whose n steps are
        played, or whose episode is over."""
        for row in map(list, self.rows):
            for k in range(3, len(row)):
                played = list(takewhile(lambda step: step, row[k:k + n_step]))
                if played and (len(played) == n_step or played[-1][4] or played[-1][5]):
                    total = sum(gamma ** i * reward for i, (_, _, reward, *_) in enumerate(played))
                    yield *played[0][:2], total, played[-1][3], float(played[-1][4]), gamma ** len(played)


def name_of(state, action, reward, next_state, terminal, discount):
    """Equal names: equal transitions, bit for bit, in float32."""
    state, next_state = (colours(x) if x.dtype == np.uint8 else x for x in (state, next_state))
    return state.tobytes(), int(action), float(reward), next_state.tobytes(), float(terminal), float(discount)


class Everything:
    """In the place of a generator: every place that could be drawn, once."""

    def choice(self, count, batch, p):
        assert len(p) == count and p.sum() == pytest.approx(1) and (p >= 0).all()
        return np.flatnonzero(p)


@pytest.mark.parametrize("n_step", [1, 3, 5])
@pytest.mark.parametrize("n_envs, size", [(1, 26), (3, 17)])
def test_at_every_moment_the_same_transitions_as_in_a_memory_of_whole_floats(n_step, n_envs, size):
    """Half full, just wrapped and wrapped a dozen times: all that can be drawn, and nothing else."""
    rng = np.random.default_rng(size)
    memory, naive = ReplayMemory(size * n_envs, n_envs, n_step, 0.5, (4, 2, 2)), NaiveMemory(size, n_envs)
    seen = set()
    for step in islice(steps(rng, n_envs), 200 * n_envs):
        memory.push(*step)
        naive.push(*step)
        expected = Counter(name_of(*row) for row in naive.transitions(n_step, 0.5))
        assert len(memory) == expected.total()
        if expected:
            sample = memory.sample(0, Everything())
            assert Counter(name_of(*row) for row in zip(*sample, strict=True)) == expected
            assert [part.dtype for part in sample] == ["uint8", "int64", "float32", "uint8", "float32", "float32"]
            for part in sample:
                part[:] = 7  # a batch is no view into the memory
        seen |= {name[4:] for name in expected}
    assert memory.written.min() > 10 * size
    assert seen == {(end, 0.5 ** k) for k in range(1, n_step + 1) for end in (0, 1)}  # ends at every distance


def test_transitions_are_drawn_in_proportion_to_their_priority():
    memory, _ = filled(100, go_on=0.9)
    rng, counts, can = np.random.default_rng(2), Counter(), memory.priority > 0
    assert set(memory.priority[can]) == {1.0} and can.sum() == len(memory) > 30
    memory.priority[can] = rng.uniform(0.1, 3, len(memory))
    for _ in range(40):
        memory.sample(500, rng)
        counts.update(zip(*(part.tolist() for part in memory.drawn), strict=True))
    expected = {place: 20_000 * memory.priority[place] / memory.priority.sum() for place in counts}
    chi_square = sum((counts[place] - n) ** 2 / n for place, n in expected.items())
    assert len(counts) == len(memory) and chi_square < len(memory) + 5 * (2 * len(memory)) ** 0.5


def test_a_new_transition_gets_the_highest_priority_there_is():
    memory, play = filled(50, go_on=1)
    memory.priority[memory.priority > 0] *= 0.25
    before = memory.priority.copy()
    before[0, 20] = memory.priority[0, 20] = 7  # far from where the next frame is written
    memory.push(*next(play))
    new = memory.priority > before
    assert new.sum() == 1 and memory.priority[new] == 7


def test_a_place_takes_the_bytes_that_the_help_says_and_nearly_all_places_can_be_drawn():
    memory = ReplayMemory(4000, 4)
    taken = sum(value.nbytes for value in vars(memory).values() if isinstance(value, np.ndarray)) / 4000
    assert f"{taken:,.0f} bytes" in Settings.__dataclass_fields__["memory"].metadata["help"] and taken < 7100
    memory, _ = filled(4000, size=1000, go_on=0.99)
    assert 0.93 * 2000 < len(memory) < 2000
