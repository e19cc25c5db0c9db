"""Even work over data-parallel ranks: who moves, and that nothing is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from workers.balance_program import LENGTHS

from megatron_rl.workers.balance import SLACK, plan_moves

SIZES = st.lists(st.lists(st.integers(1, 60), max_size=8), min_size=1, max_size=5)


def after(sizes: list[list[int]], moves: dict[tuple[int, int], int]) -> list[list[int]]:
    held: list[list[int]] = [[] for _ in sizes]
    for rank, row in enumerate(sizes):
        for unit, size in enumerate(row):
            held[moves.get((rank, unit), rank)].append(size)
    return held


@given(SIZES)
@settings(max_examples=200, deadline=None)
def test_moves_leave_no_rank_idle_and_never_make_the_fullest_fuller(sizes):
    moves = plan_moves(sizes)
    held = after(sizes, moves)
    loads, before = [sum(row) for row in held], [sum(row) for row in sizes]
    assert max(loads) <= max(before)
    assert all(rank != target for (rank, _), target in moves.items())
    if sum(map(len, sizes)) >= len(sizes):
        assert all(held), "a rank has nothing while another has two units"
    limit, givers = (1 + SLACK) * sum(loads) / len(loads), [row for row in held if len(row) > 1]
    fullest = max(map(sum, givers), default=0)  # within the slack, or no unit of it would lower the larger load
    stuck = [min(row) >= fullest - min(loads) for row in givers if sum(row) == fullest]
    assert fullest <= limit or any(stuck)


def test_even_ranks_move_nothing_and_few_units_move_otherwise():
    assert plan_moves([[5, 5, 5], [5, 5, 5]]) == {}
    assert plan_moves([[100] * 10, [95] * 10]) == {}  # within a tenth
    assert plan_moves([[3] * 8, []]) == {(0, unit): 1 for unit in range(4)}
    assert plan_moves([[8, 1, 1], [2]]) == {(0, 1): 1, (0, 2): 1}
    assert plan_moves([[50], [1, 1], []]) == {(1, 0): 2}
    assert plan_moves([[7]]) == {}


@pytest.mark.distributed
def test_sequences_travel_whole_and_what_was_computed_of_them_comes_home():
    out = run_ranks(Path(__file__).with_name("balance_program.py"), 3, timeout=120)
    ranks = json.loads(next(line for line in out.splitlines() if line.startswith("RESULT "))[7:])
    everything = [
        (1000 * rank + i, [100 * rank + 10 * i + t for t in range(length)])
        for rank, row in enumerate(LENGTHS)
        for i, length in enumerate(row)
    ]
    for name in ("alone", "pairs", "rows"):
        parts = [rank[name] for rank in ranks]
        assert all(part["came_back"] for part in parts)
        assert all(part["temperature"] == 0.7 for part in parts)
        held = sorted((o, r) for part in parts for o, r in zip(part["owners"], part["rows"], strict=True))
        assert held == everything
        for part in parts:
            assert part["mask"] == [int(t > 0) for row in part["rows"] for t in range(len(row))]
    loads = [sum(map(len, rank["alone"]["rows"])) for rank in ranks]
    assert max(loads) <= (1 + SLACK) * sum(loads) / 3
    assert [len(rank["rows"]["rows"]) for rank in ranks] == [4, 3, 3]
    for rank in ranks:
        assert rank["alone"]["units"] is None
        owners, units = rank["pairs"]["owners"], rank["pairs"]["units"]
        assert len(owners) % 2 == 0
        for first, second in zip(owners[0::2], owners[1::2], strict=True):  # pairs stay together, in their order
            assert (second - first, first % 2) == (1, 0)
        assert units == [i // 2 for i in range(len(owners))]
        assert rank["untouched"]
