"""What a plan promises, on layouts small enough to read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from models.oracle import ALL, QWEN3, QWEN3_MOE
from reshard.random_layouts import rows_layout

from megatron_rl.models import megatron_layout, rollout_layout
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard import Layout, ReshardPlan, Shard, Span, Topology
from megatron_rl.reshard.certificate import certify
from megatron_rl.reshard.index import LayoutIndex, SourceIndex, patterns_of


def test_plan_replicates_kv_heads_when_rollout_tp_exceeds_them() -> None:
    source = megatron_layout(QWEN3, RankGrid(ParallelSizes(tp=2), 2), 64)
    plan = ReshardPlan(source, rollout_layout(QWEN3, 4, [range(2, 6)]))
    keys = "model.layers.0.self_attn.k_proj.weight"
    rows = [[t.rectangle[:2] for t in plan.for_rank(rank).receives if t.tensor == keys] for rank in range(2, 6)]
    assert rows == [[(0, 4)], [(0, 4)], [(4, 8)], [(4, 8)]]
    assert certify(plan).received.optimal


def test_a_target_that_the_source_does_not_cover_is_refused_by_name() -> None:
    whole = rows_layout("trainer", [0], 1, rows=6)
    plan = ReshardPlan(whole, rows_layout("rollout", [1, 2], 2, rows=8))
    assert plan.for_rank(1).received_elements == 16
    with pytest.raises(ValueError, match=r"rollout.w on rank 2 needs w\[6:8, 0:4\], which no rank of trainer holds"):
        plan.for_rank(2)
    with pytest.raises(ValueError, match=r"rank 2 needs w\[6:8, 0:4\]"):
        certify(plan)


def test_a_target_tensor_unknown_to_the_source_is_refused_by_name() -> None:
    plan = ReshardPlan(rows_layout("trainer", [0], 1), rows_layout("rollout", [0], 1, tensor="extra"))
    with pytest.raises(ValueError, match=r"rollout\.w on rank 0 needs extra"):
        plan.for_rank(0)
    with pytest.raises(ValueError, match="extra"):
        certify(plan)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ((Span("w", 0, 2, 0, 4, 0, 0), Span("w", 2, 4, 0, 4, 1, 0)), "two spans overlap"),
        ((Span("w", 0, 8, 0, 4, 1, 0),), "leaves the matrix"),
    ],
)
def test_a_shard_that_would_be_written_twice_or_outside_is_refused(spans: tuple[Span, ...], message: str) -> None:
    broken = Layout("broken", {0: 0}, lambda replica: [Shard("b", (8, 4), spans)])
    plan = ReshardPlan(rows_layout("trainer", [0], 1), broken)
    for check in (lambda: plan.for_rank(0), lambda: certify(plan)):
        with pytest.raises(ValueError, match=message):
            check()


def test_equal_layouts_on_the_same_ranks_move_nothing() -> None:
    plan = ReshardPlan(rows_layout("a", range(4), 2), rows_layout("b", range(4), 2))
    certificate = certify(plan)
    assert certificate.received.actual == 0
    assert certificate.resident == 2 * 4 * 16
    assert not plan.for_rank(0).sends


def test_replicas_of_the_trainer_share_the_sending_evenly() -> None:
    plan = ReshardPlan(rows_layout("a", range(4), 1), rows_layout("b", [4], 1), min_share=1)
    assert [plan.for_rank(rank).sent_elements for rank in range(4)] == [8, 8, 8, 8]
    assert certify(plan).max_holder_egress.optimal


def test_many_replicas_cost_the_trainer_no_more_than_one() -> None:
    for replicas in (1, 3, 7):
        plan = ReshardPlan(rows_layout("a", [0, 1], 2), rows_layout("b", range(2, 2 + replicas), 1))
        assert [plan.for_rank(rank).sent_elements for rank in (0, 1)] == [16, 16]
        assert all(plan.for_rank(rank).sent_elements <= 32 for rank in plan.ranks)


def test_what_a_rank_stores_twice_is_received_once() -> None:
    spans = [Shard(name, (8, 4), (Span("w", 0, 8, 0, 4, 0, 0),)) for name in ("embedding", "output")]
    plan = ReshardPlan(rows_layout("a", [0], 1), Layout("tied", {1: 0}, lambda replica: spans))
    part = plan.for_rank(1)
    assert part.received_elements == 32
    assert [(copy.src.shard, copy.dst.shard) for copy in part.duplicates] == [("embedding", "output")]
    assert certify(plan).repeated == 32


def test_a_rank_outside_both_layouts_has_nothing_to_do() -> None:
    part = ReshardPlan(rows_layout("a", [0], 1), rows_layout("b", [1], 1)).for_rank(9)
    assert (part.sends, part.receives, part.copies) == ((), (), ())


def test_plans_and_certificates_can_be_read() -> None:
    plan = ReshardPlan(rows_layout("a", [0, 1], 2), rows_layout("b", [2, 3], 1), Topology(2))
    assert "a on 2 ranks (2 different) -> b on 2 ranks (1 different)" in str(plan)
    assert "receives 32 in 2 rectangles from 2 ranks" in str(plan.for_rank(2))
    text = str(certify(plan))
    assert "minimal" in text
    assert "each of 64 target elements is written exactly once" in text


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.family)
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (4, 1), (4, 2)])
def test_a_plan_that_looks_at_one_tensor_of_each_kind_is_the_same_plan(architecture, tp: int, ep: int) -> None:
    ep = ep if architecture.experts else 1
    sizes = ParallelSizes(tp=2, pp=2, ep=2 if architecture.experts else 1)
    source = megatron_layout(architecture, RankGrid(sizes, 4), 64)
    target = rollout_layout(architecture, tp, [range(first, first + tp) for first in (2, 2 + tp)], ep)
    assert target.symmetry is not None
    full = LayoutIndex(target).patterns
    sampled = patterns_of(target, full)
    assert {t: (p.rectangles, p.replicas) for t, p in sampled.items()} == {
        t: (p.rectangles, p.replicas) for t, p in full.items()
    }
    plan, slow = ReshardPlan(source, target), ReshardPlan(source, replace(target, symmetry=None))
    assert all(plan.for_rank(rank) == slow.for_rank(rank) for rank in plan.ranks)


def test_the_index_of_a_large_layout_grows_with_replica_groups_not_ranks() -> None:
    def index(world: int) -> SourceIndex:
        return SourceIndex(megatron_layout(QWEN3_MOE, RankGrid(ParallelSizes(tp=2, pp=2, ep=2), world), 64))

    small, large = index(8), index(512)
    assert [t.pattern.rectangles for t in small.tensors.values()] == [
        t.pattern.rectangles for t in large.tensors.values()
    ]
