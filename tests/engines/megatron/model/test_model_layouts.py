"""Models built on every layout give what one rank gives; real ranks (see layout_program.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines.megatron.model.layout_program import cases
from forked import run_ranks

PROGRAM = Path(__file__).with_name("layout_program.py")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def errors() -> dict[str, tuple[float, float]]:
    """Of each case: the largest relative errors of outputs and of gradients."""
    rows = [line.split("|") for line in run_ranks(PROGRAM, 4).splitlines() if line.startswith("case|")]
    return {name: (float(outputs), float(gradients)) for _, name, outputs, gradients in rows}


@pytest.mark.distributed
@pytest.mark.parametrize("case", [case.name for case in cases()])
def test_outputs_and_gradients_do_not_depend_on_the_layout(errors, case):
    assert all(error < TOLERANCE for error in errors[case]), errors[case]
    assert len(errors) == 27
