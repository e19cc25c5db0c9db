"""The tests marked gpu, rehearsed on CPU tensors, so that what fails on a GPU is the GPU's and not the test's.

References run as they are, CUDA kernels built for the host and Triton kernels interpreted where there is a Triton.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def rehearse(python: str, *arguments: str, **environment: str) -> str:
    merged = {**os.environ, "PYTHONPATH": str(ROOT), "MEGATRON_RL_REHEARSE_GPU": "1", **environment}
    command = [python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=merged, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_the_gpu_tests_pass_on_references_on_the_cpu() -> None:
    files = [str(ROOT / "tests" / "ops" / name) for name in ("test_gpu_maths.py", "test_gpu_implementations.py")]
    out = rehearse(sys.executable, "-k", "not triton and not cuda", *files)
    assert " passed" in out
    assert "no CUDA device" not in out  # the reason why they would all be skipped
