"""What roles do over FSDP2, on one rank and on two between which nothing divides evenly."""

from __future__ import annotations

from pathlib import Path

from engines.fsdp2.roles_program import CASES
from forked import run_ranks

PROGRAM = Path(__file__).with_name("roles_program.py")


def test_adapters_value_models_checkpoints_and_rollouts_do_not_depend_on_the_number_of_ranks(tmp_path):
    for ranks in (1, 2):
        lines = run_ranks(PROGRAM, ranks, tmp_path, timeout=300).splitlines()
        assert sum(line.endswith(" is right") for line in lines) == len(CASES)
