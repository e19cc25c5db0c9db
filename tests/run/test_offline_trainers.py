"""Evaluation and cached reference log-probabilities of preference training, on two layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_ranks
from small_run import ROOT, write_run

pytestmark = pytest.mark.distributed
PROGRAM = Path(__file__).with_name("offline_program.py")
KINDS = ("DPOTrainer", "KTOTrainer")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("offline")
    write_run(folder)
    out = run_ranks(PROGRAM, 2, str(folder), timeout=400, PYTHONPATH=f"{ROOT}:{ROOT / 'tests' / 'run'}")
    (line,) = [line for line in out.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_cached_reference_gives_the_metrics_of_the_model(results, kind, layout):
    assert results[f"{kind} {layout} cache"] == pytest.approx(results[f"{kind} {layout} model"], rel=1e-4, abs=1e-5)


def test_one_file_serves_every_layout_and_another_data_set_has_its_own(results):
    files = [results[f"{kind} {layout} cache files"] for layout in ("tp2", "dp2") for kind in KINDS]
    assert files == [1, 1, 1, 1]  # KTO takes the pairs apart into the same rows
    assert results["DPOTrainer tp2 model files"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_covers_every_row_and_does_not_depend_on_the_layout(results, kind):
    one, other = results[f"{kind} tp2 model"], results[f"{kind} dp2 model"]
    assert one["eval/num_rows"] == (11.0 if kind == "DPOTrainer" else 22.0)
    evaluated = {name: value for name, value in one.items() if name.startswith("eval/")}
    assert evaluated == pytest.approx({name: other[name] for name in evaluated}, rel=1e-3, abs=1e-4)
    assert 0.0 < evaluated["eval/loss/total"] < 2.0
    assert "eval/rewards/accuracies" in evaluated


def test_kl_of_held_out_pairs_is_mismatched_and_does_not_depend_on_the_ranks(results):
    """The chosen and the rejected answer of a prompt lie next to each other: a neighbour is no mismatch."""
    one, other = results["KTOTrainer tp2 model"]["eval/kto/kl"], results["KTOTrainer dp2 model"]["eval/kto/kl"]
    assert one > 0.01
    assert one == pytest.approx(other, rel=1e-3)
