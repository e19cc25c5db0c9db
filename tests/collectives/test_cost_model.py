"""The fitted costs and the choice by them, with numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_rl.collectives.cost_model import HIERARCHICAL, LIBRARY, SIZES, Cost, choose
from megatron_rl.collectives.link import split
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.selector import CHECK_EVERY, MEASURE_EVERY, Selector

MB = 1 << 20


def test_two_sizes_give_latency_and_slope():
    cost = Cost.fitted([(MB, 0.011), (4 * MB, 0.041)])
    assert cost.latency == pytest.approx(0.001)
    assert cost.seconds(2 * MB) == pytest.approx(0.021)


def test_a_slope_that_is_noise_gives_the_larger_sample_alone():
    assert Cost.fitted([(MB, 0.5), (4 * MB, 0.4)]) == Cost(0.0, 0.4 / (4 * MB))


def test_the_library_is_left_only_for_a_gain_above_the_minimum():
    costs = {LIBRARY: Cost(0.0, 10e-9), HIERARCHICAL: Cost(0.001, 8e-9)}
    edge = 0.001 / (0.9 * 10e-9 - 8e-9)  # bytes: latency over what each byte gains
    assert choose(costs, int(edge * 0.99), 0.1).path == LIBRARY
    assert choose(costs, int(edge * 1.01), 0.1).path == HIERARCHICAL
    assert choose({**costs, HIERARCHICAL: Cost(0.0, 9.5e-9)}, 1 << 30, 0.1).path == LIBRARY


def never(size: int) -> Callable[[], None]:
    raise AssertionError("no path is run")


def selector(**seconds: float) -> Selector:
    """One rank, whose paths take so many seconds for any size; the clock is not asked."""
    made = Selector(
        "all_reduce",
        {LIBRARY: never, HIERARCHICAL: never},
        lambda figures: None,
        lambda figures: None,
        minimum_gain=0.1,
        deterministic=False,
        talks=False,
    )
    made._probe = lambda size: [seconds["library"], seconds["hierarchical"]]  # type: ignore[method-assign]
    return made


def test_it_calibrates_once_and_again_when_predictions_are_off(monkeypatch):
    chosen = selector(library=0.4, hierarchical=0.1)
    choice = chosen.choose(1, 8 * MB)
    assert choice.path == HIERARCHICAL
    for _ in range(CHECK_EVERY):
        chosen.measured(choice, 8 * MB, choice.predicted * 1.1)
    assert chosen.choose(CHECK_EVERY, 8 * MB).path == HIERARCHICAL
    assert chosen.num_calibrations == 1
    for _ in range(CHECK_EVERY):
        chosen.measured(choice, 8 * MB, choice.predicted * 5)
    monkeypatch.setattr(chosen, "_probe", lambda size: [0.1, 0.5])
    assert chosen.choose(CHECK_EVERY + 1, 8 * MB).path == HIERARCHICAL  # ranks look at their predictions together
    assert chosen.choose(2 * CHECK_EVERY, 8 * MB).path == LIBRARY
    assert chosen.num_calibrations == 2


def test_what_is_the_librarys_is_left_alone_but_for_every_sixteenth_message():
    chosen = selector(library=0.1, hierarchical=0.4)
    assert not chosen.leaves_alone(1, 8 * MB)  # nothing is measured yet
    chosen.choose(1, 8 * MB)
    assert [number for number in range(1, 65) if not chosen.leaves_alone(number, 8 * MB)] == [16, 32, 48, 64]
    assert CHECK_EVERY % MEASURE_EVERY == 0  # so ranks that agree are never at a call of the library's own
    other = selector(library=0.4, hierarchical=0.1)
    other.choose(1, 8 * MB)
    assert not other.leaves_alone(2, 8 * MB)


def test_deterministic_never_takes_the_library():
    made = Selector(
        "x", {}, lambda figures: None, lambda figures: None, minimum_gain=0.1, deterministic=True, talks=False
    )
    assert made.choose(1, SIZES[0]).path == HIERARCHICAL
    assert not made.leaves_alone(2, SIZES[0])


@pytest.mark.parametrize("total", [0, 1, 2, 7, 1000, 12345])
@pytest.mark.parametrize("weights", [[1], [1, 1], [2.0, 1.0], [0.3, 0.3, 0.4]])
def test_shares_cover_everything(total, weights):
    sizes = split(total, weights)
    assert sum(sizes) == total
    assert all(abs(size - total * weight / sum(weights)) <= 1 for size, weight in zip(sizes, weights, strict=True))


def test_nodes_are_numbered_by_their_first_rank():
    nodes = NodeMap.of(["b", "a", "b", "a", "b"])
    assert nodes.nodes == ((0, 2, 4), (1, 3))
    assert (nodes.size, nodes.num_nodes, nodes.lanes) == (5, 2, 2)
    assert nodes.order == (0, 2, 4, 1, 3)
    assert nodes.place(3) == (1, 1)
    assert nodes.first(1) == 3
    with pytest.raises(ValueError, match="rank 7"):
        nodes.place(7)


def test_what_rounding_leaves_out_comes_back_once_it_was_delivered():
    from megatron_rl.collectives.error_feedback import ErrorFeedback

    feedback, exact = ErrorFeedback(True), torch.tensor([1.0 + 2**-10])
    first = feedback.rounded("x", exact, torch.bfloat16)
    assert torch.equal(feedback.rounded("x", exact, torch.bfloat16), first)  # sent again: the same numbers
    feedback.commit()
    total = first.float()
    for _ in range(7):
        total = total + feedback.rounded("x", exact, torch.bfloat16).float()
        feedback.commit()
    assert float(abs(total - 8 * exact)) <= 2**-8
