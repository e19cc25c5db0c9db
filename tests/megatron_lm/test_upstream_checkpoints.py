"""Against Megatron-LM's own sources (MEGATRON_LM_PATH; skipped without them): checkpoints there and back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torchrun import ROOT, run_torchrun

SOURCES = os.environ.get("MEGATRON_LM_PATH", "")
PROGRAM = Path(__file__).with_name("upstream_program.py")

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not SOURCES, reason="no MEGATRON_LM_PATH: where Megatron-LM's sources lie"),
]


@pytest.mark.parametrize(("ranks", "cases"), [(1, 5), (2, 6)])
def test_megatron_lm_saves_we_convert_both_ways_and_it_loads_the_same_logits(ranks, cases, tmp_path):
    tests = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(PROGRAM.parent)])
    out = run_torchrun(PROGRAM, ranks, str(tmp_path), timeout=500, PYTHONPATH=tests, PYTHONNOUSERSITE="1")
    equal = [line for line in out.splitlines() if line.startswith("EQUAL")]
    assert len(equal) == 3 * cases, out[-3000:]
