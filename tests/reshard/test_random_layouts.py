"""Properties of plans and their execution over random layouts."""

from __future__ import annotations

import os
from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from reshard.random_layouts import (
    assert_bitwise_equal,
    gather_and_slice,
    logical_values,
    random_layout,
    random_shapes,
    reshard_in_memory,
)

from megatron_rl.reshard import ReshardPlan, Topology, WireFormat
from megatron_rl.reshard.certificate import certify

EXAMPLES = settings(
    max_examples=int(os.environ.get("RESHARD_EXAMPLES", "40")),
    deadline=None,
    derandomize="RESHARD_EXAMPLES" not in os.environ,
    phases=[Phase.explicit, Phase.generate],  # shrinking a whole random job takes minutes and says little
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def plans(draw: st.DrawFn) -> tuple[ReshardPlan, dict[str, tuple[int, int]]]:
    rng: Random = draw(st.randoms(use_true_random=False))
    shapes = random_shapes(rng)
    num_source, num_target = rng.randint(1, 5), rng.randint(1, 6)
    first_target = rng.choice([0, num_source, rng.randint(0, num_source)])  # colocated, disaggregated, between
    source = random_layout(rng, "source", shapes, list(range(num_source)), True, rng.random() < 0.3)
    target_ranks = list(range(first_target, first_target + num_target))
    target = random_layout(rng, "target", shapes, target_ranks, False, rng.random() < 0.3)
    topology = rng.choice([None, Topology(rng.randint(1, 3))])
    return ReshardPlan(source, target, topology, min_share=rng.choice([1, 1000])), shapes


def held_elements(layout, rank: int) -> set[tuple[str, int, int]]:
    """One by one: the independent oracle of all counts."""
    return {
        (s.tensor, row, col)
        for shard in layout.shards(rank)
        for s in shard.spans
        for row in range(s.row_start, s.row_stop)
        for col in range(s.col_start, s.col_stop)
    }


@EXAMPLES
@given(plans())
def test_each_rank_receives_each_missing_element_exactly_once_and_both_ends_agree(case) -> None:
    plan, _ = case
    parts = {rank: plan.for_rank(rank) for rank in plan.ranks}
    for rank, part in parts.items():
        arrived = Counter(
            (t.tensor, row, col)
            for t in part.receives
            for row in range(t.rectangle.row_start, t.rectangle.row_stop)
            for col in range(t.rectangle.col_start, t.rectangle.col_stop)
        )
        missing = held_elements(plan.target, rank) - held_elements(plan.source, rank)
        assert set(arrived) == missing
        assert all(count == 1 for count in arrived.values())
        for peer, other in parts.items():
            there = [t[:6] for t in other.sends if t.dst_rank == rank]
            assert [t[:6] for t in part.receives if t.src_rank == peer] == there


@EXAMPLES
@given(plans())
def test_certificate_figures_equal_counts_of_single_elements(case) -> None:
    plan, _ = case
    certificate = certify(plan, WireFormat(torch.float32))
    node, source_ranks = plan.topology.node, list(plan.source.replica_of)
    held = {rank: held_elements(plan.source, rank) for rank in plan.ranks}
    wanted = {rank: held_elements(plan.target, rank) for rank in plan.ranks}
    missing = {rank: wanted[rank] - held[rank] for rank in plan.ranks}
    assert certificate.received == (4 * sum(map(len, missing.values())),) * 2
    assert certificate.resident == 4 * sum(len(wanted[r] & held[r]) for r in plan.ranks)
    assert certificate.elements + certificate.repeated == sum(
        s.numel for r in plan.ranks for shard in plan.target.shards(r) for s in shard.spans
    )
    entered = {(node(r), e) for r in plan.ranks for e in missing[r]} - {
        (node(r), e) for r in source_ranks for e in held[r]
    }
    assert certificate.inter_node == (4 * len(entered),) * 2
    parts = {rank: plan.for_rank(rank) for rank in plan.ranks}
    assert certificate.sent == {rank: 4 * part.sent_elements for rank, part in parts.items()}
    assert certificate.received_by == {rank: 4 * part.received_elements for rank, part in parts.items()}
    outside = {r: [t for t in part.sends if node(t.dst_rank) != node(r)] for r, part in parts.items()}
    assert certificate.sent_outside == {r: 4 * sum(t.numel for t in sends) for r, sends in outside.items()}
    entering = {r: [t for t in part.receives if node(t.src_rank) != node(r)] for r, part in parts.items()}
    assert certificate.received_outside == {r: 4 * sum(t.numel for t in got) for r, got in entering.items()}
    own = sum(part.sent_elements - part.forwarded_elements for part in parts.values())
    assert certificate.holder_egress == (4 * own,) * 2
    if plan.topology.ranks_per_node == 0 or set(plan.source.replica_of).isdisjoint(plan.target.replica_of):
        everything = {element for rank in plan.ranks for element in missing[rank]}
        assert own >= len(everything)
    if plan.topology.ranks_per_node == 0:
        assert own == len({element for rank in plan.ranks for element in missing[rank]})
    assert certificate.max_holder_egress.actual >= certificate.max_holder_egress.lower_bound


@EXAMPLES
@given(plans(), st.sampled_from([16, 24, 64, 200, 1 << 20]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_execution_equals_gather_and_slice_bit_for_bit_under_any_cap(case, cap: int, wire: torch.dtype) -> None:
    plan, shapes = case
    full = logical_values(shapes)
    received, reports = reshard_in_memory(plan, full, wire_dtype=wire, max_staging_bytes=cap, padding=7.0)
    through = {name: tensor.to(wire).float() for name, tensor in full.items()}
    certificate = certify(plan, WireFormat(wire))
    for rank in plan.ranks:
        has_padding = {s.name: sum(p.numel for p in s.spans) for s in plan.target.shards(rank)}
        expected = gather_and_slice(plan.target, rank, through if wire != torch.float32 else full, padding=7.0)
        for name, tensor in received[rank].items():
            if has_padding[name]:
                assert_bitwise_equal(tensor, expected[name], f"rank {rank} {name}")
        assert reports[rank].sent_bytes == certificate.sent[rank]
        assert reports[rank].received_bytes == certificate.received_by[rank]
        assert reports[rank].peak_staging_bytes <= cap


def test_a_plan_from_the_same_layouts_made_twice_is_the_same_plan() -> None:
    def make() -> ReshardPlan:
        rng = Random(5)
        shapes = random_shapes(rng)
        layouts = [random_layout(rng, name, shapes, list(range(4)), True, True) for name in ("a", "b")]
        return ReshardPlan(*layouts, min_share=1)

    first, second = make(), make()
    assert [first.for_rank(rank) for rank in range(4)] == [second.for_rank(rank) for rank in reversed(range(4))][::-1]


@pytest.mark.parametrize("runs", [2])
def test_a_resharder_is_replayed_with_new_values(runs: int) -> None:
    rng = Random(3)
    shapes = random_shapes(rng)
    source = random_layout(rng, "source", shapes, [0, 1, 2], True, False)
    target = random_layout(rng, "target", shapes, [1, 2, 3, 4], True, False)
    full = logical_values(shapes)
    received, _ = reshard_in_memory(ReshardPlan(source, target), full, runs=runs, wire_dtype=torch.float32)
    for rank in target.replica_of:
        for name, expected in gather_and_slice(target, rank, full, padding=7.0).items():
            assert_bitwise_equal(received[rank][name], expected, name)
