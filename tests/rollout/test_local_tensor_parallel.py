"""Tensor-parallel local engines give the completions of one rank, over real gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks
from torchrun import ROOT


@pytest.mark.distributed
def test_tensor_parallel_engines_give_the_completions_of_one_rank() -> None:
    program = Path(__file__).with_name("tp_program.py")
    output = run_ranks(program, 4, timeout=280, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert output.count("checked") == 6
