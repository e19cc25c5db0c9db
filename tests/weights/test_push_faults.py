"""Weight pushes between real processes that die or deliver wrong weights; `fault_program.py` has the cases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.distributed
def test_every_fault_is_named_in_bounded_time_no_mixture_is_served_and_the_next_push_heals() -> None:
    environment = os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(TESTS / "weights" / "fault_program.py")]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-6000:]}"
    assert [line[:3] for line in ended.stdout.splitlines()] == ["ok "] * 30
