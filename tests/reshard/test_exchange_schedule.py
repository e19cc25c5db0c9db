"""Messages and their order: what makes execution deadlock-free and keeps it under its limit."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import pytest
import torch
from reshard.random_layouts import random_layout, random_shapes
from reshard.test_plan import rows_layout

from megatron_rl.reshard import Layout, ReshardPlan, Shard, Span, WireFormat
from megatron_rl.reshard.exchange_schedule import Chunking, Exchange, build_schedule

WIRE = WireFormat(torch.bfloat16, {"tensor0": torch.float32})


def schedules(plan: ReshardPlan, chunking: Chunking) -> dict[int, tuple[Exchange, ...]]:
    return {rank: build_schedule(plan.for_rank(rank), plan.ranks, WIRE, chunking) for rank in plan.ranks}


def random_plan(seed: int) -> ReshardPlan:
    rng = Random(seed)
    shapes = random_shapes(rng)
    source = random_layout(rng, "source", shapes, list(range(rng.randint(1, 4))), True, True)
    return ReshardPlan(source, random_layout(rng, "target", shapes, list(range(2, 8)), True, True), min_share=1)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("chunking", [Chunking(8, 5), Chunking(64, 50), Chunking(1 << 20, 1 << 20)], ids=str)
def test_both_ends_cut_alike_and_agree_on_the_order(seed: int, chunking: Chunking) -> None:
    of = schedules(random_plan(seed), chunking)
    sent, received = {}, {}
    for rank, exchanges in of.items():
        keys = [(e.round, e.slot, e.number) for e in exchanges]
        assert keys == sorted(set(keys))
        for e in exchanges:
            key = (e.round, e.slot, e.number)
            if e.send:
                sent[key, rank, e.peer] = (e.send.dtype, [(p.rows, p.cols, p.start) for p in e.send.pieces])
            if e.receive:
                received[key, e.peer, rank] = (e.receive.dtype, [(p.rows, p.cols, p.start) for p in e.receive.pieces])
    assert sent == received


@pytest.mark.parametrize("seed", range(20))
def test_in_each_slot_a_rank_has_one_peer(seed: int) -> None:
    for exchanges in schedules(random_plan(seed), Chunking(16, 10)).values():
        peers = defaultdict(set)
        for e in exchanges:
            peers[e.round, e.slot].add(e.peer)
        assert all(len(group) == 1 for group in peers.values())


@pytest.mark.parametrize("seed", range(20))
def test_what_is_passed_on_arrived_in_an_earlier_round(seed: int) -> None:
    for exchanges in schedules(random_plan(seed), Chunking(16, 10)).values():
        arrived = {
            (p.offset.shard, p.offset.row + row, p.offset.col + col): e.round
            for e in exchanges
            if e.receive
            for p in e.receive.pieces
            for row in range(p.rows)
            for col in range(p.cols)
        }
        for e in exchanges:
            for p in e.send.pieces if e.send else ():
                for row in range(p.rows if p.forwarded else 0):
                    for col in range(p.cols):
                        assert arrived[p.offset.shard, p.offset.row + row, p.offset.col + col] < e.round


@pytest.mark.parametrize("chunk_bytes", [2, 6, 8, 64])
def test_no_message_exceeds_a_chunk_even_where_a_single_row_does(chunk_bytes: int) -> None:
    plan = ReshardPlan(rows_layout("a", [0], 1, rows=6, cols=7), rows_layout("b", [1, 2], 2, rows=6, cols=7))
    exchanges = build_schedule(plan.for_rank(0), plan.ranks, WIRE, Chunking(chunk_bytes, 1000))
    sizes = [e.send.num_bytes for e in exchanges if e.send]
    assert max(sizes) <= chunk_bytes
    assert sum(sizes) == 2 * 6 * 7


def test_small_rectangles_share_a_message() -> None:
    source = rows_layout("a", [0], 1)
    quarters = [Shard(f"b{i}", (2, 4), (Span("w", 2 * i, 2 * i + 2, 0, 4, 0, 0),)) for i in range(4)]
    plan = ReshardPlan(source, Layout("b", {1: 0}, lambda replica: quarters))
    (exchange,) = build_schedule(plan.for_rank(1), plan.ranks, WIRE, Chunking(1 << 20, 1000))
    assert exchange.receive is not None
    assert [piece.start for piece in exchange.receive.pieces] == [0, 8, 16, 24]
