"""Where a real SGLang is, for the tests that need one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from integration.warm_sglang import warm_python

from megatron_rl.rollout.sglang.server import CPU_SHIM

ROOT = Path(__file__).resolve().parents[2]
SHIM = CPU_SHIM


def own_sglang_python() -> str:
    """The Python of SGLang's environment; skips the test where there is none."""
    python = Path(os.environ.get("MEGATRON_RL_SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))
    if not (python.parent.parent / ".ready").exists():
        pytest.skip(f"no SGLang at {python}: run `make test-sglang`, which installs it")
    return str(python)


def sglang_python() -> str:
    """Starts the same servers in a second, as forks of a process that has imported SGLang."""
    return warm_python(own_sglang_python())
