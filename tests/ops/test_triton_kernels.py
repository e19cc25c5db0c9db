"""The Triton kernels without a GPU: interpreted on small inputs, and compiled ahead of time with their PTX read.

Runs where triton is installed; MEGATRON_RL_TRITON_PYTHON may name another interpreter that has it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPS = ("copy_spans", "block_quantize", "span_checksum", "accumulate", "token_logprobs", "gae")
FILES = tuple(f"test_{op}.py" for op in OPS)
ARCHITECTURES = ("80", "90", "100")


@pytest.fixture(scope="module")
def triton_python() -> str:
    chosen = os.environ.get("MEGATRON_RL_TRITON_PYTHON")
    if chosen:
        return chosen
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed, and MEGATRON_RL_TRITON_PYTHON names no interpreter that has it")
    return sys.executable


def run(command: list[str], **environment: str) -> str:
    merged = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "0", **environment}
    result = subprocess.run(command, cwd=ROOT, env=merged, capture_output=True, text=True, timeout=560, check=False)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout


def test_the_interpreted_kernels_agree_with_the_references(triton_python: str):
    """The tests of every implementation, in a process whose kernels are interpreted."""
    files = [str(ROOT / "tests" / "ops" / name) for name in FILES]
    out = run([triton_python, "-m", "pytest", "-q", "-k", "triton", *files], TRITON_INTERPRET="1")
    assert " passed" in out
    assert "failed" not in out


@pytest.fixture(scope="module")
def compiled(triton_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    script = str(ROOT / "tests" / "ops" / "triton_ahead_of_time.py")
    cache = str(tmp_path_factory.mktemp("triton"))
    out = run([triton_python, script, *ARCHITECTURES], TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache)
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", ["copy aligned wide", "copy aligned narrow", "copy bf16 bits", "checksum", "quantize"])
def test_aligned_kernels_load_sixteen_bytes_at_a_time(compiled, case, architecture):
    found = compiled[f"{case} sm_{architecture}"]
    assert found["cubin_bytes"] > 0
    assert not found["local_memory"]
    assert "ld.global.v4.b32" in found["loads"]
    assert not {"ld.global.b8", "ld.global.b16"} & set(found["loads"])
    if case.startswith("copy"):
        assert found["stores"] == ["st.global.v4.b32"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_unaligned_copy_makes_no_claim_of_alignment(compiled, architecture):
    assert not any("v4" in load or "v2" in load for load in compiled[f"copy unaligned sm_{architecture}"]["loads"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", ["logprob fold", "logprob gradient"])
def test_the_passes_over_logits_load_sixteen_bytes_at_a_time_and_spill_nothing(compiled, case, architecture):
    found = compiled[f"{case} sm_{architecture}"]
    assert found["cubin_bytes"] > 0
    assert not found["local_memory"]
    assert "ld.global.v4.b32" in found["loads"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_load_sixteen_bytes_at_a_time_and_spill_nothing(compiled, architecture):
    found = compiled[f"accumulate sm_{architecture}"]
    assert found["cubin_bytes"] > 0
    assert not found["local_memory"]
    assert "ld.global.v4.b32" in found["loads"]
    assert set(found["stores"]) == {"st.global.v4.b32"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_scan_of_gae_spills_nothing(compiled, architecture):
    found = compiled[f"gae sm_{architecture}"]
    assert found["cubin_bytes"] > 0
    assert not found["local_memory"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantization_divides_with_ieee_rounding(compiled, architecture):
    assert compiled[f"quantize sm_{architecture}"]["divisions"] == ["div.rn.f32"]
