"""Weights into real SGLang servers of one and two ranks; `delivery_program.py` says what is asserted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from integration.environment import ROOT, sglang_python

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
CASES = 9  # lines of one run of the program


@pytest.mark.parametrize(("family", "ranks"), [("llama", 1), ("llama", 2), ("qwen3_moe", 2)])
def test_every_delivery_brings_exactly_the_trainers_weights_and_heals_what_failed(family: str, ranks: int) -> None:
    program = Path(__file__).with_name("delivery_program.py")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    ended = subprocess.run(
        [sys.executable, str(program), family, str(ranks), sglang_python()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-6000:]}"
    assert sum(line.startswith("ok ") for line in ended.stdout.splitlines()) == CASES
