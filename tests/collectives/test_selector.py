"""The choice over many messages: what is measured once, what is left alone, and what a wrong prediction leads to.

One rank, whose clock is given: `Played` says what each path takes, the selector what it takes instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from megatron_rl.collectives.cost_model import HIERARCHICAL, LIBRARY, SIZES, Cost
from megatron_rl.collectives.selector import MEASURE_EVERY, QUICK, Selector
from megatron_rl.collectives.watch import LONGEST, LOOK_EVERY, TRIALS

MB = 1 << 20


def never(size: int) -> Callable[[], None]:
    raise AssertionError("no path is run")


def made(deterministic: bool = False) -> Selector:
    return Selector(
        "all_reduce",
        {LIBRARY: never, HIERARCHICAL: never},
        lambda figures: None,
        lambda figures: None,
        minimum_gain=0.1,
        deterministic=deterministic,
        talks=False,
    )


class Played:
    """Messages of a group whose paths take ``seconds(path, num_bytes)``.

    Args:
        predicted: what calibration finds instead; None: the truth.
    """

    def __init__(self, seconds, predicted=None) -> None:
        self.seconds, self.selector = seconds, made()
        predicted = predicted or (lambda path, size: self.seconds(path, size))
        self.selector._probe = lambda size: [predicted(path, size) for path in (LIBRARY, HIERARCHICAL)]

    def send(self, num_bytes: int, late: float = 0.0) -> str:
        """The path of one message, all ranks of which are ``late`` unless they begin together."""
        number = self.selector.next_number(num_bytes)
        if self.selector.leaves_alone(number, num_bytes):
            return LIBRARY
        choice = self.selector.choose(number, num_bytes)
        together = self.selector._watches[num_bytes.bit_length()].trial is not None
        taken = self.seconds(choice.path, num_bytes) + (0 if together else late)
        self.selector.measured(number, choice, num_bytes, taken)
        return choice.path

    def paths(self, num_bytes: int, count: int, late: float = 0.0) -> list[str]:
        return [self.send(num_bytes, late) for _ in range(count)]


def rates(library: float, hierarchical: float) -> Callable[[str, int], float]:
    """Seconds for each MB."""
    return lambda path, size: {LIBRARY: library, HIERARCHICAL: hierarchical}[path] * size / MB


def test_it_measures_once_where_predictions_hold_and_tries_the_library_now_and_then():
    group = Played(rates(0.04, 0.02))
    paths = group.paths(8 * MB, 2000)
    assert paths.count(LIBRARY) <= 8 * TRIALS
    assert paths[-1] == HIERARCHICAL
    assert group.selector.num_calibrations == 1


def test_a_path_that_takes_longer_than_the_library_is_left():
    """As on the loopback: 31 ms predicted from 1 and 4 MB, 59 taken, 42 by the library."""
    group = Played(rates(0.0026, 0.0037), predicted=rates(0.0026, 0.0019))
    paths = group.paths(16 * MB, 40)
    assert paths[:3] == [HIERARCHICAL] * 3
    assert paths[3 + 2 * TRIALS :] == [LIBRARY] * (40 - 3 - 2 * TRIALS)


def test_a_library_that_was_underestimated_is_found_though_its_own_predictions_look_right():
    group = Played(rates(0.001, 0.02), predicted=rates(0.04, 0.02))
    assert group.paths(8 * MB, 60)[-1] == LIBRARY


def test_a_link_that_slows_down_is_measured_again():
    group = Played(rates(0.01, 0.04))
    assert set(group.paths(8 * MB, 100)) == {LIBRARY}
    group.seconds = rates(0.4, 0.1)
    assert group.paths(8 * MB, 2 * LOOK_EVERY)[-1] == HIERARCHICAL
    assert group.selector.num_calibrations == 2
    assert group.send(3 * MB) == HIERARCHICAL  # other sizes as well


def test_ranks_that_come_late_are_no_reason_to_measure_for_ever():
    group = Played(rates(0.03, 0.02))
    paths = group.paths(2 * MB, 3000, late=0.5)
    assert paths[-1] == HIERARCHICAL
    assert paths.count(LIBRARY) <= 12 * TRIALS
    assert group.selector.num_calibrations <= 12


@pytest.mark.parametrize("seed", range(20))
def test_in_the_end_the_library_is_taken_where_it_is_faster_whatever_was_predicted(seed):
    """Random latencies and rates, wrong predictions, noise of 3 %. (A path whose prediction was too high is not tried
    as long as the library does what it promised.)"""
    chance = random.Random(seed)

    def cluster() -> Callable[[str, int], float]:
        latency = {path: 10 ** chance.uniform(-4, -1.5) for path in (LIBRARY, HIERARCHICAL)}
        rate = {path: 10 ** chance.uniform(-3.5, -1.5) for path in (LIBRARY, HIERARCHICAL)}
        return lambda path, size: latency[path] + rate[path] * size / MB

    exact, group = cluster(), Played(None, predicted=cluster())
    group.seconds = lambda path, size: exact(path, size) * chance.uniform(0.97, 1.03)
    sizes = [chance.randrange(1000, 64 * MB) for _ in range(4)]
    for _ in range(2 * LONGEST):
        for size in sizes:
            group.send(size)
    for size in sizes:
        gain = 1 - exact(HIERARCHICAL, size) / exact(LIBRARY, size)
        assert gain > 0 or group.selector.now(size).path == LIBRARY, f"{size} bytes, gain {gain:.2f}"


def test_large_messages_are_measured_where_links_are_fast_alone():
    slow, fast = Played(rates(QUICK, QUICK)), Played(rates(QUICK / 8, QUICK / 8))
    slow.send(MB), fast.send(MB)
    assert [size for size, _ in slow.selector.costs[LIBRARY].samples] == list(SIZES[:2])
    assert [size for size, _ in fast.selector.costs[LIBRARY].samples] == list(SIZES)


def test_what_is_the_librarys_is_left_alone_but_for_every_sixteenth_message_and_for_looks():
    chosen = made()
    chosen._probe = lambda size: [0.1, 0.4]  # type: ignore[method-assign]
    assert not chosen.leaves_alone(1, 8 * MB)  # nothing is measured yet
    chosen.choose(1, 8 * MB)
    seen = [number for number in range(1, 4) if not chosen.leaves_alone(number, 8 * MB)]
    assert not seen
    assert not chosen.leaves_alone(4, 8 * MB)
    chosen.choose(4, 8 * MB)
    assert [n for n in range(5, 34) if not chosen.leaves_alone(n, 8 * MB)][:1] == [12]
    assert not chosen.leaves_alone(MEASURE_EVERY, 8 * MB)
    other = made()
    other._probe = lambda size: [0.4, 0.1]  # type: ignore[method-assign]
    other.choose(1, 8 * MB)
    assert not other.leaves_alone(2, 8 * MB)


def test_deterministic_never_takes_the_library():
    chosen = made(deterministic=True)
    assert chosen.choose(1, SIZES[0]).path == HIERARCHICAL
    assert not chosen.leaves_alone(2, SIZES[0])
    assert not chosen.costs


def test_what_an_earlier_run_measured_arrives_as_it_was(tmp_path, monkeypatch):
    from megatron_rl.collectives import calibrations

    monkeypatch.setattr(calibrations, "cache_folder", lambda: tmp_path)
    costs = {LIBRARY: Cost(((MB, 0.1), (4 * MB, 0.3))), HIERARCHICAL: Cost(((MB, 0.2), (3 * MB, 0.25), (7 * MB, 0.3)))}
    kept = calibrations.Calibrations("x")
    kept.save("all_reduce", costs)
    chosen = made()
    chosen._talks, chosen._calibrations = True, kept
    chosen.choose(1, MB)
    assert chosen.costs == costs
    assert chosen.num_calibrations == 0
