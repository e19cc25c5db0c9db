"""Resharding between real processes: see `exchange_program.py` for what each case asserts."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks
from reshard.exchange_program import ABSENT, MEMORY, all_cases

CASES = [*(case.name for case in all_cases()), MEMORY, ABSENT]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ended_well() -> list[str]:
    out = run_ranks(Path(__file__).with_name("exchange_program.py"), 4, timeout=280)
    return [line.removeprefix("ok ").split(": ")[0] for line in out.splitlines() if line.startswith("ok ")]


@pytest.mark.parametrize("case", CASES)
def test_four_gloo_ranks_move_the_certified_bytes_and_end_with_the_exact_shards(
    case: str, ended_well: list[str]
) -> None:
    assert ended_well.count(case) == 1


def test_there_are_as_many_cases_as_ever(ended_well: list[str]) -> None:
    assert len(ended_well) == len(set(CASES)) == 50
