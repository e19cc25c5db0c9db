"""Tensor-parallel local engines give the completions of one rank, over real gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks
from rollout.tp_program import CASES, Case


@pytest.fixture(scope="module")
def checked() -> list[str]:
    output = run_ranks(Path(__file__).with_name("tp_program.py"), 4, timeout=280)
    return [line.removeprefix("checked ") for line in output.splitlines() if line.startswith("checked ")]


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tensor_parallel_engines_give_the_completions_of_one_rank(checked: list[str], case: Case) -> None:
    assert checked.count(case.name) == 1
    assert len(checked) == 6
