"""`ParallelContext` on four gloo ranks, and alone in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from forked import run_ranks
from parallel.groups_program import LAYOUTS

import megatron_rl  # noqa: F401  (before megatron.core)
from megatron_rl.parallel import ParallelContext, ParallelSizes

from megatron.core import parallel_state  # isort: skip


@pytest.fixture(scope="module")
def held() -> list[str]:
    output = run_ranks(Path(__file__).with_name("groups_program.py"), 4, timeout=280)
    return [line.removeprefix("held: ") for line in output.splitlines() if line.startswith("held: ")]


@pytest.mark.distributed
@pytest.mark.parametrize("case", [*LAYOUTS, "refusals", "another order of axes"])
def test_every_group_of_a_layout_holds_the_ranks_the_layout_says(held: list[str], case: str) -> None:
    assert held.count(case) == 1


def test_one_process_without_torchrun_is_a_whole_replica(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    try:
        context = ParallelContext.create(ParallelSizes(), timeout=30, seed=3)
        assert str(context) == "rank 0 of 1 at tp 0, cp 0, dp 0, pp 0 in one rank a replica, DP1"
        assert context.is_last_stage
        assert context.gather_objects("x") == context.objects_on_rank_0("x") == ["x"]
        assert context.host_model_group is context.model_group is context.host_group is dist.group.WORLD
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
