"""A stage that fails on one data-parallel rank ends every rank with one clear error, whatever the algorithm."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
from forked import run_ranks

from megatron_rl.algorithms import ALGORITHMS

HERE = Path(__file__).parent

pytestmark = pytest.mark.distributed


@functools.cache
def cases() -> list[tuple[str, ...]]:
    path = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE)))
    out = run_ranks(HERE / "failing_stages_program.py", 2, timeout=400, PYTHONPATH=path)
    return [tuple(line.removeprefix("CASE ").split("|")) for line in out.splitlines() if line.startswith("CASE ")]


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_an_error_in_a_stage_of_one_rank_reaches_the_other(algorithm):
    found = [case for case in cases() if case[0] == algorithm and case[2] == "raises"]
    assert f"{algorithm}.prepare" in {stage for _, stage, *_ in found} or algorithm not in ("grpo", "ppo", "rloo")
    assert "optimize" in found[-1][1]
    for _, stage, _, first, second in found:
        assert second == "ArithmeticError: made to fail"
        assert first == f"PeerError: {stage} failed on rank 1: {second}"


def test_a_nan_on_one_rank_ends_both():
    found = [case for case in cases() if case[2].startswith("NaN")]
    assert len(found) > 10
    for _, _stage, what, first, second in found:
        field = what.split()[1]
        assert second.startswith(f"NotFiniteError: {field}")
        assert "nan" in second.split("of sample")[0]
        reader = "batch.pack" if field == "reward" else "optimize"
        assert first.startswith("PeerError: ")
        assert reader in first
        assert first.endswith(second)
