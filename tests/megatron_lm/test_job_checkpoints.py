"""A run whose optimizer the job has brought goes on from its checkpoint as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks


@pytest.mark.distributed
def test_the_step_after_a_restart_is_the_step_without_one(tmp_path: Path) -> None:
    output = run_ranks(Path(__file__).with_name("checkpoint_program.py"), 1, str(tmp_path), timeout=200)
    found = {line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT ")}
    own = {"megatron_fp16", "megatron_bf16_sharded", "megatron_sgd_bf16"}
    assert found == own | {
        "adam",
        "amsgrad",
        "adamw_bf16",
        "sgd",
        "momentum",
        "momentum_bf16",
        "two_groups",
        "nadam refused",
    }
