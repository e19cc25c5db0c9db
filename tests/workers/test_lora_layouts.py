"""A policy with adapters gives the same numbers on every layout, with real ranks: log-probabilities, loss, gradients
of A and B and their norm, what its engine samples with, and what it exports.

Everything is compared with one process, whose own numbers have other oracles: tests/workers/test_lora.py.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run_ranks
from peft_folders import peft_update
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

PROGRAM = Path(__file__).with_name("lora_cases.py")
WORLDS = {
    1: (
        "one",
        "one_recompute",
        "one_two_targets",
        "experts_one",
        "latent_one",
        "moonlight_one",
        "shared_one",
        "mixtral_one",
        "oss_one",
    ),
    2: (
        "tp2",
        "tp2_padded",
        "tp2_recompute",
        "tp2_sp",
        "pp2",
        "pp2vpp2",
        "cp2",
        "dp2",
        "experts_ep2",
        "experts_tp2sp_ep2",
        "latent_tp2sp",
        "latent_pp2",
        "latent_ep2",
        "moonlight_tp2sp",
        "shared_ep2",
        "mixtral_tp2sp_ep2",
        "oss_tp2sp_ep2",
    ),
    4: ("tp2pp2", "tp2sp_dp2", "latent_tp2sp_pp2_ep2"),
}
# Adapters of the model: of a llama with five layers, and of two layers of each mixture. Of the latent one those are
# five of attention each, two of the dense layer, two of each of eight experts and two of the shared one.
NUM_ADAPTERS = {
    "one": 5 * 4,
    "experts": 2 * 2,
    "latent": 2 * 5 + 2 + 8 * 2 + 2,
    "moonlight": 2 * 3,
    "shared": 2 * (2 + 4 * 2 + 2),
    "mixtral": 2 * (2 + 4 * 2),
    "oss": 2 * (2 + 4 * 2),
}
CASES = [case for cases in WORLDS.values() for case in cases]
SAME_ADAPTERS = [case for case in CASES if case != "one_two_targets"]
MIXTURES = [case for case in CASES if case.partition("_")[0] in NUM_ADAPTERS and not case.startswith("one")]
DENSE = [case for case in CASES if case not in MIXTURES]

pytestmark = pytest.mark.distributed


@functools.cache
def results(model: str) -> dict[str, dict[str, Any]]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for world, cases in WORLDS.items():
            run_ranks(PROGRAM, world, model, folder, *cases, timeout=400)
            for case in cases:
                found[case] = torch.load(Path(folder) / f"{case}.pt", weights_only=True)
                found[case]["exported"] = load_file(Path(folder) / case / "model.safetensors")
                found[case]["adapters"] = load_file(Path(folder) / f"{case} peft" / "adapter_model.safetensors")
                found[case]["config"] = json.loads((Path(folder) / f"{case} peft" / "adapter_config.json").read_text())
                if case in MIXTURES:
                    found[case]["gaps"] = gaps(Path(folder), case)
    return found


def gaps(folder: Path, case: str) -> dict[str, tuple[bool, float]]:
    """For each parameter of `transformers`: whether the folder of adapters has one for it, and how far the exported
    parameter is from the base with the update that PEFT makes of that folder, in fp64."""
    base, exported = (
        dict(AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).double().named_parameters())
        for name in (f"{alone(case)} base", case)
    )
    adapters = load_file(folder / f"{case} peft" / "adapter_model.safetensors")
    found = {}
    for name, weight in base.items():
        update = peft_update(adapters, name, weight)
        expected = weight if update is None else weight + 1.5 * update
        found[name] = (update is not None, float((exported[name] - expected).abs().max()))
    assert sum(adapted for adapted, _ in found.values()) == len(adapters) // 2
    return found


@pytest.fixture(scope="module")
def found(seeded_model) -> dict[str, dict[str, Any]]:
    return results(str(seeded_model))


def alone(case: str) -> str:
    """The case of one process to compare with."""
    return f"{case.partition('_')[0]}_one" if case in MIXTURES else "one"


def close(one: Any, other: Any, tolerance: float) -> bool:
    return torch.allclose(torch.as_tensor(one), torch.as_tensor(other), atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("case", SAME_ADAPTERS)
def test_first_values_are_bitwise_the_same_and_b_is_zero(found, case):
    one, other = found[alone(case)]["first"], found[case]["first"]
    assert one.keys() == other.keys()
    assert len(one) == 2 * NUM_ADAPTERS[alone(case).partition("_")[0]]
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(bool(one[name].any()) == name.endswith(".a") for name in one)


@pytest.mark.parametrize("case", SAME_ADAPTERS)
def test_layout_changes_neither_logprobs_nor_loss_nor_gradient_norm(found, case):
    one, other = found[alone(case)], found[case]
    for field in ("logprobs", "trained after"):
        assert close(other[field], one[field], 5e-5), field
    for name, tolerance in (("loss/total", 1e-6), ("loss/kl", 5e-5), ("optimizer/gradient_norm", 1e-5)):
        assert math.isclose(other["metrics"][name], one["metrics"][name], rel_tol=tolerance, abs_tol=1e-6), name
    assert one["metrics"]["optimizer/gradient_norm"] > 0.1


@pytest.mark.parametrize("case", SAME_ADAPTERS)
def test_layout_changes_no_gradient_of_an_adapter(found, case):
    one, other = found[alone(case)]["gradients"], found[case]["gradients"]
    for name in one:
        assert (other[name] - one[name]).norm() <= 1e-5 * one[name].norm(), name
    idle = {name.rpartition(".linear_")[0] for name in one if not one[name].any()}
    assert len(idle) <= 1, "of the experts of all layers at most one gets no token"
    assert all(".experts." in name for name in idle)


@pytest.mark.parametrize("case", CASES)
def test_gradient_norm_counts_every_element_once(found, case):
    squares = sum(float(gradient.double().square().sum()) for gradient in found[case]["gradients"].values())
    assert math.isclose(found[case]["metrics"]["optimizer/gradient_norm"], math.sqrt(squares), rel_tol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_actor_without_adapters_bit_for_bit(found, case):
    assert found[case]["off"] == found[case]["own"]  # a model of its own from the same folder
    assert found[case]["off"] == found[case]["at first"]  # B is zero
    assert found[case]["off"] == found[case]["off later"]  # and still so with other adapters
    assert not close(found[case]["logprobs"], found[case]["off"], 0.05)


@pytest.mark.parametrize("case", CASES)
def test_frozen_weights_stay_bitwise_the_same_through_steps_and_pushes(found, case):
    assert found[case]["unchanged"]


@pytest.mark.parametrize("case", CASES)
def test_engine_samples_with_merged_weights(found, case):
    assert found[case]["gap"] < 1e-4


@pytest.mark.parametrize("case", [case for case in SAME_ADAPTERS if case in DENSE])
def test_exported_weights_are_the_merged_ones(found, case, seeded_model):
    base, one, other = load_file(seeded_model / "model.safetensors"), found["one"]["exported"], found[case]["exported"]
    assert one.keys() == other.keys() == base.keys()
    for name in base:
        adapted = name.endswith("proj.weight")
        assert torch.equal(other[name], base[name]) == (not adapted), name
        assert close(other[name], one[name], 1e-6), name


@pytest.mark.parametrize("case", DENSE)
def test_adapters_alone_are_the_difference_of_the_exported_weights(found, case, seeded_model):
    """As PEFT reads them: W + lora_alpha / r * B A, one pair for each Hugging Face weight."""
    base, exported, adapters = load_file(seeded_model / "model.safetensors"), found[case]["exported"], {}
    for name, tensor in found[case]["adapters"].items():
        assert name.startswith("base_model.model.model.layers.")
        weight, letter = name.removeprefix("base_model.model.").rsplit(".lora_", 1)
        adapters.setdefault(f"{weight}.weight", {})[letter[0]] = tensor
    config = found[case]["config"]
    assert {name.split(".")[-2] for name in adapters} == set(config["target_modules"])
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6.0)
    for name in base:
        update = 1.5 * adapters[name]["B"] @ adapters[name]["A"] if name in adapters else torch.zeros(())
        assert close(exported[name], base[name] + update, 1e-6), name


@pytest.mark.parametrize("case", MIXTURES)
def test_adapters_of_mixtures_are_what_the_export_has_merged(found, case):
    for name, (adapted, gap) in found[case]["gaps"].items():
        assert gap <= (1e-6 if adapted else 0.0), name


def test_only_chosen_modules_have_adapters(found):
    names = {name.rsplit(".", 2)[1] for name in found["one_two_targets"]["first"]}
    assert names == {"linear_fc2", "linear_qkv"}
