"""Link loads of hand-made plans, and times from them."""

from __future__ import annotations

import pytest
import torch
from reshard.random_layouts import rows_layout

from megatron_rl.reshard import LinkSpeeds, ReshardPlan, Topology, WireFormat, link_load
from megatron_rl.reshard.certificate import certify

SPEEDS = LinkSpeeds(intra_node=100.0, inter_node=10.0)


def load_of(target_ranks: list[int], topology: Topology):
    """Rank 0 holds 64 fp32 elements, 256 bytes; each target rank needs all of them."""
    plan = ReshardPlan(rows_layout("a", [0], 1, rows=16), rows_layout("b", target_ranks, 1, rows=16), topology)
    return link_load(certify(plan, WireFormat(torch.float32)))


def test_a_copy_inside_a_node_loads_the_inner_links_only() -> None:
    load = load_of([1], Topology(2))
    assert (load.intra_sent, load.intra_received, load.inter_sent, load.inter_received) == (256, 256, 0, 0)
    assert load.seconds(SPEEDS) == pytest.approx(2.56)


def test_a_byte_that_two_ranks_of_a_node_need_crosses_into_it_once() -> None:
    load = load_of([2, 3], Topology(2))
    assert (load.intra_received, load.inter_sent, load.inter_received) == (256, 256, 256)
    assert load.max_depth == 2
    assert load.seconds(SPEEDS, chunk_bytes=10) == pytest.approx(25.6 + 1.0)  # the last rank waits one chunk longer


def test_what_is_already_there_takes_no_time() -> None:
    assert load_of([0], Topology(2)).seconds(SPEEDS) == 0.0


def test_speeds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        LinkSpeeds(inter_node=0)
