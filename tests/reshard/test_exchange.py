"""Resharding between real processes: see `exchange_program.py` for what each case asserts."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.distributed
def test_four_gloo_ranks_move_the_certified_bytes_and_end_with_the_exact_shards() -> None:
    out = run_ranks(TESTS / "reshard" / "exchange_program.py", 4, timeout=280, PYTHONPATH=f"{TESTS.parent}:{TESTS}")
    assert out.count("\nok ") + out.startswith("ok ") == 50, out[-2000:]
