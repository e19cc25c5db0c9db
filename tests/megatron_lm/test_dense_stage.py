"""A job's first pipeline stage need not hold a router for its experts to be read as they are chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks

pytestmark = pytest.mark.distributed


def test_routers_of_later_stages_are_read_on_every_rank() -> None:
    out = run_ranks(Path(__file__).with_name("dense_stage_program.py"), 2, timeout=200)
    assert out.count("as it was built") == 3
