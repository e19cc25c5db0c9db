"""The fitted costs and the choice by them, with numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_rl.collectives.cost_model import HIERARCHICAL, LIBRARY, Cost, Line, choose
from megatron_rl.collectives.link import split
from megatron_rl.collectives.nodes import NodeMap

MB = 1 << 20


def test_two_sizes_give_latency_and_slope():
    line = Line.fitted([(MB, 0.011), (4 * MB, 0.041)])
    assert line.latency == pytest.approx(0.001)
    assert line.seconds_per_byte * MB == pytest.approx(0.010)


def test_a_slope_that_is_noise_gives_the_larger_sample_alone():
    assert Line.fitted([(MB, 0.5), (4 * MB, 0.4)]) == Line(0.0, 0.4 / (4 * MB))


def test_what_was_measured_is_predicted_and_lines_go_on_beyond_it():
    cost = Cost(((MB, 0.011), (4 * MB, 0.041), (32 * MB, 0.601)))
    assert [cost.seconds(size) for size, _ in cost.samples] == [0.011, 0.041, 0.601]
    assert cost.seconds(2 * MB) == pytest.approx(0.021)
    assert cost.seconds(18 * MB) == pytest.approx(0.321)
    assert cost.seconds(64 * MB) == pytest.approx(0.601 + 32 * 0.020)  # as from 4 to 32 MB
    assert cost.seconds(MB // 2) == pytest.approx(0.006)  # as from 1 to 4 MB
    assert Cost(((MB, 0.003), (4 * MB, 0.021))).seconds(MB // 4) == pytest.approx(0.00075)  # never below proportion


def test_sizes_that_are_near_each_other_give_no_slope():
    """8 MB, and 4 bytes less of it: the same in two samples that differ by noise."""
    cost = Cost(((MB, 0.011), (8 * MB - 4, 0.080), (8 * MB, 0.081)))
    assert cost.seconds(16 * MB) == pytest.approx(0.161)
    assert Cost(((8 * MB - 4, 0.080), (8 * MB, 0.081))).seconds(16 * MB) == pytest.approx(0.162)


def test_a_new_sample_replaces_that_of_its_power_of_two():
    cost = Cost(((MB, 0.01), (5 * MB, 0.05))).learned((6 * MB, 0.03)).learned((2 * MB, 0.02))
    assert cost.samples == ((MB, 0.01), (2 * MB, 0.02), (6 * MB, 0.03))


def linear(latency: float, seconds_per_byte: float) -> Cost:
    return Cost(tuple((size, latency + size * seconds_per_byte) for size in (MB, 4 * MB)))


def test_the_library_is_left_only_for_a_gain_above_the_minimum():
    costs = {LIBRARY: linear(0.0, 10e-9), HIERARCHICAL: linear(0.001, 8e-9)}
    edge = 0.001 / (0.9 * 10e-9 - 8e-9)  # bytes: latency over what each byte gains
    assert choose(costs, int(edge * 0.99), 0.1).path == LIBRARY
    assert choose(costs, int(edge * 1.01), 0.1).path == HIERARCHICAL
    assert choose({**costs, HIERARCHICAL: linear(0.0, 9.5e-9)}, 1 << 30, 0.1).path == LIBRARY


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
