"""Critics of PPO leave the job: one with weights of its own as a sequence classifier, one on shared weights as the head
beside the policy. Both come back with the same values, in other layouts and in `transformers`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_ranks
from small_run import ROOT, write_run

pytestmark = pytest.mark.distributed
PROGRAM = Path(__file__).with_name("critic_program.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("critics")
    write_run(folder)
    out = run_ranks(PROGRAM, 2, str(folder), timeout=300, PYTHONPATH=f"{ROOT}:{ROOT / 'tests' / 'run'}")
    (line,) = [line for line in out.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_a_saved_critic_has_the_values_that_it_had_in_training(results, kind):
    found = results[kind]
    trained = found.pop("trained")
    assert max(map(abs, trained)) > 0.05
    assert len(found) == (2 if kind == "own" else 5)
    for way, values in found.items():
        assert values == pytest.approx(trained, abs=1e-5), way
