"""Random messages on four real ranks against float64 sums, and mutants of the path that these must find."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks

PROGRAM = Path(__file__).with_name("property_program.py")

pytestmark = pytest.mark.distributed


def test_random_messages_are_summed_rightly_and_unusual_tensors_are_taken():
    output = run_ranks(PROGRAM, 4, timeout=300)
    assert output.count("held: ") == 2, output


@pytest.mark.parametrize("mutant", ["dropped", "twice", "late"])
def test_a_mutant_on_one_rank_is_found(mutant):
    output = run_ranks(PROGRAM, 4, mutant, timeout=300)
    line = next(line for line in output.splitlines() if line.startswith("held: "))
    assert int(line.split()[1]) > 0, line
