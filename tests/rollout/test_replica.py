"""The ranks that share servers learn how a generation ended, from the one that talks to the servers."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks


@pytest.mark.distributed
def test_errors_of_the_first_rank_reach_the_others_with_their_text() -> None:
    said = run_ranks(Path(__file__).with_name("replica_program.py"), 2, timeout=240)
    assert "rank 0 knows" in said
    assert "rank 1 knows" in said
