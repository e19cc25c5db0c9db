"""Layouts and topologies as data."""

from __future__ import annotations

import pytest

from megatron_rl.reshard import Layout, Shard, Span, Topology, block, stack_rows
from megatron_rl.reshard.layout import matrix_shape


def test_tensors_are_seen_as_matrices() -> None:
    assert matrix_shape(()) == (1, 1)
    assert matrix_shape((5,)) == (5, 1)
    assert matrix_shape((5, 3)) == (5, 3)
    assert matrix_shape((2, 5, 3)) == (10, 3)


def test_blocks_are_equal_or_refused() -> None:
    assert [block(6, i, 3) for i in range(3)] == [(0, 2), (2, 4), (4, 6)]
    with pytest.raises(ValueError, match="heads of 6 cannot be split over 4 ranks: choose a divisor of 6"):
        block(6, 0, 4, "heads")


def test_rows_are_stacked_below_one_another() -> None:
    assert stack_rows([("a", 2, 4), ("b", 0, 3)], 7, row=1) == (
        Span("a", 2, 4, 0, 7, 1, 0),
        Span("b", 0, 3, 0, 7, 3, 0),
    )


def test_ranks_of_a_cell_are_replicas_and_a_cell_is_emitted_once() -> None:
    emitted = []

    def emit(replica: object) -> list[Shard]:
        emitted.append(replica)
        return [Shard(f"{replica}", (1,), ())]

    layout = Layout("two", {3: "b", 1: "a", 2: "b"}, emit)
    assert layout.replicas == {"a": (1,), "b": (2, 3)}
    assert layout.shards(2) is layout.shards(3)
    assert layout.shards(9) == ()
    assert emitted == ["b"]


def test_a_topology_is_consecutive_ranks_or_a_map() -> None:
    assert [Topology(2).node(rank) for rank in range(5)] == [0, 0, 1, 1, 2]
    assert Topology().node(77) == 0
    assert Topology(nodes={0: 5, 1: 4}).node(1) == 4


def test_a_topology_refuses_what_it_cannot_answer() -> None:
    with pytest.raises(ValueError, match="not both"):
        Topology(2, {0: 0})
    with pytest.raises(ValueError, match=r"rank 3 has no node: the topology names ranks \[0\]"):
        Topology(nodes={0: 0}).node(3)
