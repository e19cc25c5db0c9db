"""Two rollout replicas of two ranks each under torchrun, with a real server each: see `replicas_program.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.environment import ROOT, sglang_python
from torchrun import run_torchrun

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_two_replicas_generate_and_generate_again_after_a_push() -> None:
    program = Path(__file__).with_name("replicas_program.py")
    out = run_torchrun(program, 4, sglang_python(), "2", timeout=580, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    print(out)
    assert sum(line.startswith("ok version") for line in out.splitlines()) == 2
