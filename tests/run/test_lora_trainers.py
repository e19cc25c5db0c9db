"""Whole runs with adapters: they learn, resume exactly, and their checkpoints convert to what they export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_ranks
from safetensors.torch import load_file
from small_run import ROOT, metrics_of, write_run
from transformers import AutoModelForCausalLM

from megatron_rl.engines.conversion import convert

pytestmark = pytest.mark.distributed
PROGRAM, TRAIN = (ROOT / "tests" / "run" / f"{name}_program.py" for name in ("lora", "train"))
PATHS = f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests' / 'run'}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def results(folder, seeded_model) -> dict:
    out = run_ranks(PROGRAM, 2, str(seeded_model), str(folder), timeout=500, PYTHONPATH=PATHS)
    (line,) = [line for line in out.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


def evaluations(out: Path, name: str) -> list[float]:
    return [metrics[name] for metrics in metrics_of(out).values() if name in metrics]


@pytest.mark.parametrize("layout", ["tp2", "dp2", "pp2"])
def test_dpo_learns_the_preference_on_names_it_never_saw(results, folder, layout):
    margins = evaluations(folder / layout, "eval/rewards/margins")
    assert margins[0] == 0.0, "the reference is the model without adapters, and B begins at zero"
    assert margins[-1] > 1.0
    assert results[layout]["eval/rewards/accuracies"] == 1.0
    assert results[layout]["eval/loss/preference"] < 0.4  # log 2 = 0.69 at first


def test_layouts_learn_the_same(results):
    for name in ("eval/rewards/margins", "eval/loss/preference"):
        found = [results[layout][name] for layout in ("tp2", "dp2", "pp2")]
        assert found == pytest.approx([found[0]] * 3, rel=2e-3, abs=1e-4)


def test_a_resumed_run_ends_bitwise_where_the_uninterrupted_one_did(results):
    assert results["difference resumed tp2"] == 0.0
    assert results["resumed tp2"] == results["tp2"]
    assert results["difference from base"] > 1e-3


def test_a_run_resumed_on_another_layout_ends_nearby(results):
    assert results["difference resumed pp2"] < 2e-4


def test_cached_reference_is_that_of_the_frozen_model(results):
    assert results["cached"] == pytest.approx(results["tp2"], rel=1e-4, abs=1e-5)


def test_a_checkpoint_with_adapters_is_refused_as_a_model_and_says_how_to_convert_it(results):
    assert "megatron-rl convert" in results["refused"]


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_converted_checkpoint_is_the_exported_model(results, folder, layout, tmp_path):
    convert(folder / layout / "checkpoints" / "step_000012", tmp_path / "hf", "hf")
    found, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", folder / layout / "hf"))
    assert found.keys() == expected.keys()
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < 1e-6
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.num_hidden_layers == 5


def test_grpo_with_adapters_and_their_base_as_reference_runs_from_a_config_file(tmp_path):
    config = write_run(tmp_path)
    options = [
        "algorithm.num_mini_batches=1",
        "parallel.tp=2",
        "actor.lora.rank=4",
        "actor.lora.alpha=16",
        "actor.optimizer.learning_rate=0.02",
    ]
    run_ranks(TRAIN, 2, str(config), *options, PYTHONPATH=PATHS)
    whole = metrics_of(tmp_path / "out")
    assert whole[1]["loss/kl"] == pytest.approx(0.0, abs=1e-6)
    assert whole[6]["loss/kl"] > 1e-4
    assert all(metrics["mismatch/kl"] < 1e-5 for metrics in whole.values() if "mismatch/kl" in metrics)
    other = tmp_path / "again"
    resume = [f"trainer.resume={tmp_path / 'out' / 'checkpoints' / 'step_000004'}", f"trainer.output_dir={other}"]
    run_ranks(TRAIN, 2, str(config), *options, *resume, PYTHONPATH=PATHS)
    assert metrics_of(other) == {step: whole[step] for step in (5, 6)}
