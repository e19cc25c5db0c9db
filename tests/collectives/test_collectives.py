"""Every case of collectives_program.py, on four real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks
from torchrun import run_torchrun

MAPS = ("((0, 1), (2, 3))", "((0, 2), (1, 3))", "((0,), (1, 2, 3))", "((0, 1, 2, 3),)", "((0,), (1,), (2,), (3,))")
CASES = [
    *(f"division {nodes} over {links} links" for nodes in MAPS for links in (1, 2)),
    "bf16 on the wire, with and without error feedback",
    "process group, deterministic=False",
    "process group, deterministic=True",
    "many at once",
    "calibration of an earlier run",
]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def held() -> set[str]:
    output = run_ranks(Path(__file__).with_name("collectives_program.py"), 4, timeout=400)
    return {line.removeprefix("held: ") for line in output.splitlines() if line.startswith("held: ")}


@pytest.mark.parametrize("case", CASES)
def test_case_holds(case, held):
    assert case in held


def test_no_case_is_left_out(held):
    assert held == set(CASES)


@pytest.mark.network
def test_a_link_that_fails_in_mid_operation_is_left_out_by_every_rank():
    output = run_torchrun(Path(__file__).with_name("failing_links_program.py"), 4, timeout=400)
    assert output.count("held: ") == 3, output
