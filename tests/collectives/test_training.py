"""Megatron's DDP and distributed optimizer over hybrid groups: the same steps as over the library, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], list[dict[str, float]]]:
    output = run_ranks(Path(__file__).with_name("training_program.py"), 2, timeout=400)
    lines = [json.loads(line[7:]) for line in output.splitlines() if line.startswith("RESULT ")]
    return {(job, way): steps for job, way, steps in lines}


@pytest.mark.parametrize("way", ["hybrid", "deterministic", "large pieces"])
@pytest.mark.parametrize("job", ["plain", "sharded"])
def test_steps_are_those_of_the_library_to_the_bit(job, way, found):
    assert found[job, way] == found[job, "library"]
    assert found[job, way][0] != found[job, way][1]
