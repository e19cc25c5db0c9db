"""Weight pushes between real processes that die or deliver wrong weights; `fault_program.py` has the cases."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_alone
from weights.fault_program import CASES

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ended_well() -> list[str]:
    out = run_alone(Path(__file__).with_name("fault_program.py"), timeout=280)
    return [line.removeprefix("ok ").rsplit(": ", 1)[0] for line in out.splitlines() if line.startswith("ok ")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_fault_is_named_in_bounded_time_no_mixture_is_served_and_the_next_push_heals(case, ended_well) -> None:
    assert ended_well.count(case.name) == 1
    assert len(ended_well) == 30
