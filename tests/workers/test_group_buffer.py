"""The buffer under every order of events: no group twice, none lost, none older than the bound, and it never sticks."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rl.batch import Prompt, Sample
from megatron_rl.workers.prompt_groups.group import Group, Stage, group_from_bytes, group_to_bytes
from megatron_rl.workers.prompt_groups.group_buffer import GroupBuffer, Taken
from megatron_rl.workers.prompt_groups.law import BatchLaw, Law, WindowedLaw

STEPS = 12


@dataclass
class Run:
    """A run whose engines, training and pushes take turns at random, as ``rng`` says."""

    law: Law
    rng: random.Random
    slots: int
    filtered: float  # share of groups that the filter drops
    buffer: GroupBuffer = field(init=False)
    trained: int = 0  # version of the training weights, and steps done
    served: int = 0  # version of the engines' weights
    drawn: int = 0  # prompts
    running: list[tuple[Group, int]] = field(default_factory=list)  # what engines work on, aborted ones included
    taken: list[Taken] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.buffer = GroupBuffer(self.law)

    def actions(self) -> list[str]:
        found = ["start"] * (len(self.running) < self.slots) + ["finish"] * bool(self.running) + ["train"]
        may_push = self.trained > self.served and self.buffer.may_push(self.served)
        return found + ["push"] * may_push

    def step(self) -> bool:
        """Whether something could be done."""
        actions = self.actions()
        self.rng.shuffle(actions)
        return any(getattr(self, action)() for action in actions)

    def start(self) -> bool:
        if demand := self.buffer.demand(self.served):
            prompts = [Prompt([1], index=self.drawn + number) for number in range(demand.num_prompts)]
            self.drawn += demand.num_prompts
            assert [group.prompt for group in self.buffer.add(prompts, demand)] == prompts
        group = self.buffer.start(self.served)
        if group is not None:
            assert group.stage is Stage.IN_FLIGHT
            self.running.append((group, group.draw))
        return group is not None

    def finish(self) -> bool:
        if not self.running:
            return False
        group, draw = self.running.pop(self.rng.randrange(len(self.running)))
        spans = [(group.version, 3), *([(self.served, 2)] if self.served > group.version else [])]
        samples = [Sample(group.prompt, [1], [0.0], policy_version=self.served, policy_version_spans=spans)]
        kept = self.rng.random() >= self.filtered
        if self.buffer.finish(group.ticket, draw, samples, kept):
            self.left["filtered"] += group.ticket not in self.buffer.groups
            assert group_from_bytes(group_to_bytes(group)) == group
        return True

    def train(self) -> bool:
        if isinstance(self.law, BatchLaw) and self.trained > self.served:
            return False  # every version is pushed: training waits for it
        before = list(self.buffer.groups)
        taken = self.buffer.take(self.trained)
        if taken is None:
            return False
        self.taken.append(taken)
        self.trained += 1
        self.left["unused"] += len(before) - len(self.buffer.groups) - len(taken.groups)
        return True

    def push(self) -> bool:
        self.served = self.trained
        self.buffer.expire(self.trained)
        return True

    def finished(self) -> Run:
        for _ in range(20_000):
            if len(self.taken) == STEPS:
                return self
            assert self.step(), f"nothing can happen any more: {self.buffer.groups}"
        raise AssertionError(f"only {len(self.taken)} steps in 20,000 events")


def check(run: Run, lag: int) -> None:
    """No group twice, none lost, none older than the bound."""
    tickets = [group.ticket for taken in run.taken for group in taken.groups]
    assert len(set(tickets)) == len(tickets)
    assert not set(tickets) & set(run.buffer.groups)
    assert len(tickets) + run.left["filtered"] + run.left["unused"] + len(run.buffer.groups) == run.drawn
    for version, taken in enumerate(run.taken):
        oldest = [min(v for v, _ in group.samples[0].policy_version_spans) for group in taken.groups]
        assert taken.staleness == [version - v for v in oldest]
        assert all(0 <= staleness <= lag for staleness in taken.staleness)


LAGS = st.integers(0, 4)
SEEDS = st.integers(0, 10**6)
SLOTS = st.integers(1, 12)


@settings(max_examples=30)
@given(LAGS, SEEDS, SLOTS, st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 3))
def test_batch_law_trains_each_step_on_its_own_prompts_at_exactly_its_lag(lag, seed, slots, size, filtered, rounds):
    law = BatchLaw(size, lag, max_rounds=rounds if filtered else 1)
    run = Run(law, random.Random(seed), slots, filtered).finished()
    check(run, lag)
    for step, taken in enumerate(run.taken):
        assert {group.batch for group in taken.groups} == {step}
        assert taken.staleness == [min(step, lag)] * len(taken.groups)
        assert [g.ticket for g in taken.groups if g.kept] == sorted(g.ticket for g in taken.groups if g.kept)
        assert 1 <= len(taken.groups) <= size
        if not filtered:
            assert [g.prompt.index for g in taken.groups] == list(range(step * size, (step + 1) * size))
        elif len(taken.groups) < size:
            rounds_of_step = law.max_rounds * size
            assert taken.num_filtered + len(taken.groups) == rounds_of_step, "all rounds were tried"


@settings(max_examples=30)
@given(SEEDS, SEEDS, LAGS, SLOTS, st.integers(1, 5))
def test_batch_law_takes_the_same_groups_in_every_order_of_events(one, other, lag, slots, size):
    runs = [Run(BatchLaw(size, lag), random.Random(seed), slots, 0.0).finished() for seed in (one, other)]
    assert runs[0].taken == runs[1].taken


@settings(max_examples=30)
@given(LAGS, SEEDS, SLOTS, st.integers(1, 5), st.integers(0, 12), st.floats(0, 1), st.sampled_from([0.0, 0.5]))
def test_windowed_law_stays_within_lag_and_window(lag, seed, slots, size, spare, window, filtered):
    law = WindowedLaw(size, lag, size + spare, window)
    run = Run(law, random.Random(seed), slots, filtered)
    buffer_take = run.buffer.take
    windows = []

    def take(version: int) -> Taken | None:
        before = set(run.buffer.groups)
        taken = buffer_take(version)
        for group in taken.groups if taken else ():
            windows.append(group.ticket - min(before))
            before.remove(group.ticket)
        return taken

    run.buffer.take = take  # type: ignore[method-assign]
    check(run.finished(), lag)
    assert all(len(taken.groups) == size for taken in run.taken)
    assert max(windows) < law.window_groups
    assert len(run.buffer.groups) <= law.capacity


def test_a_slow_group_holds_up_no_more_than_the_window():
    law = WindowedLaw(num_groups=2, lag=9, capacity=10)  # a window of 3 tickets
    buffer = GroupBuffer(law)
    demand = buffer.demand(0)
    assert demand is not None
    assert demand.num_prompts == 10
    buffer.add([Prompt([1])] * 10, demand)
    for _ in range(10):
        buffer.start(0)
    for ticket in (9, 8, 4, 3, 2):
        buffer.finish(ticket, 0, [])
    assert buffer.take(0) is None, "only ticket 2 lies in the window 0..2"
    buffer.finish(1, 0, [])
    taken = buffer.take(1)
    assert taken is not None
    assert [group.ticket for group in taken.groups] == [1, 2]
    assert buffer.take(2) is None
    buffer.finish(0, 0, [])
    taken = buffer.take(2)
    assert taken is not None
    assert [group.ticket for group in taken.groups] == [0, 3]
    assert taken.staleness == [2, 2]


def test_too_old_groups_are_drawn_again_and_late_answers_to_the_first_draw_are_forgotten():
    buffer = GroupBuffer(WindowedLaw(1, 1, 2))
    demand = buffer.demand(0)
    assert demand is not None
    buffer.add([Prompt([1]), Prompt([2])], demand)
    first, second = buffer.start(0), buffer.start(0)
    assert first is not None
    assert second is not None
    assert buffer.finish(1, 0, [Sample(second.prompt, [1], [0.0])])
    assert buffer.expire(1) == []
    assert [group.ticket for group in buffer.expire(2)] == [0], "the one in flight; the finished one is too old as well"
    assert not buffer.finish(0, 0, [])
    again = buffer.start(2)
    assert again is not None
    assert (again.ticket, again.draw, again.prompt, again.samples) == (0, 1, first.prompt, [])
    assert buffer.finish(0, 1, [])
    taken = buffer.take(2)
    assert taken is not None
    assert (taken.staleness, taken.num_redrawn) == ([0], 2)
    assert not buffer.finish(0, 0, []), "of a group that is gone"
    with pytest.raises(ValueError, match="group 1, draw 1, was finished, but it is waiting, draw 1"):
        buffer.finish(1, 1, [])
    with pytest.raises(ValueError, match="group 7, draw 0, was finished, but it is unknown"):
        buffer.finish(7, 0, [])


def test_a_buffer_smaller_than_a_step_is_refused():
    with pytest.raises(ValueError, match="a buffer of 3 groups never holds the 4 of a step"):
        WindowedLaw(4, 1, 3)
