"""A folder of adapters in PEFT's format starts training: on one process, on layouts with real ranks, and under FSDP2.

What the folder means is computed from its tensors here, by PEFT's formulas.
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
from peft_folders import factor_of, numbered_update, peft_update, rank_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

PROGRAM = Path(__file__).with_name("given_lora_cases.py")
WORLDS = {
    1: ("one_alone", "one_fsdp2", "latent_alone", "shared_alone", "oss_alone"),
    2: ("one_tp2", "one_pp2vpp2", "one_fsdp2dp2", "latent_pp2", "latent_ep2", "shared_tp2ep2", "oss_tp2ep2"),
    4: ("latent_tp2pp2ep2",),
}
CASES = [case for cases in WORLDS.values() for case in cases]

pytestmark = pytest.mark.distributed


@functools.cache
def results(model: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for world, cases in WORLDS.items():
            run_ranks(PROGRAM, world, model, name, *cases, timeout=400)
            for case in cases:
                kind = case.partition("_")[0]
                found[case] = torch.load(folder / f"{case}.pt", weights_only=True)
                found[case]["config"] = json.loads((folder / f"{case} first" / "adapter_config.json").read_text())
                for which in ("first", "trained"):
                    found[case][which] = load_file(folder / f"{case} {which}" / "adapter_model.safetensors")
                found[case]["given"] = load_file(folder / f"{kind} given" / "adapter_model.safetensors")
                found[case]["gaps"] = gaps(folder, case, kind)
    return found


def gaps(folder: Path, case: str, kind: str) -> dict[str, tuple[bool, float]]:
    """For each parameter of `transformers`: whether the folder adapts it, and how far the merged one is from the base
    with the folder's update, in fp64."""
    base, merged = (
        dict(AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).double().named_parameters())
        for name in (f"{kind} base", f"{case} merged")
    )
    given = load_file(folder / f"{kind} given" / "adapter_model.safetensors")
    found = {}
    for name, weight in base.items():
        update = numbered_update(given, name)
        update = peft_update(given, name, weight) if update is None else update
        expected = weight if update is None else weight + factor_of(kind, name.removesuffix(".weight")) * update
        found[name] = (update is not None, float((merged[name] - expected).abs().max()))
    return found


@pytest.fixture(scope="module")
def found(seeded_model) -> dict[str, dict[str, Any]]:
    return results(str(seeded_model))


def alone(case: str) -> str:
    return f"{case.partition('_')[0]}_alone"


@pytest.mark.parametrize("case", CASES)
def test_the_model_is_its_base_with_the_folders_update(found, case):
    for name, (adapted, gap) in found[case]["gaps"].items():
        assert gap <= (2e-6 if adapted else 0.0), name
    expected = 2 * (1 + 2) if case.startswith("shared") else len(found[case]["given"]) // 2
    assert sum(adapted for adapted, _ in found[case]["gaps"].values()) == expected


@pytest.mark.parametrize("case", CASES)
def test_layout_changes_neither_logprobs_nor_gradients(found, case):
    one, other = found[alone(case)], found[case]
    assert torch.allclose(torch.tensor(other["logprobs"]), torch.tensor(one["logprobs"]), atol=5e-5)
    assert math.isclose(other["norm"], one["norm"], rel_tol=1e-5)
    assert other.get("gap", 0.0) < 1e-4
    for name, gradient in other.get("gradients", {}).items():
        expected = one["gradients"][name]
        assert (gradient - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


@pytest.mark.parametrize("case", CASES)
def test_a_step_moves_the_same_adapters(found, case):
    one, other = found[alone(case)], found[case]
    assert one["trained"].keys() == other["trained"].keys()
    for name, tensor in other["trained"].items():
        assert torch.allclose(tensor, one["trained"][name], atol=1e-6), name
    moved = [name for name, tensor in other["trained"].items() if not torch.equal(tensor, other["first"][name])]
    assert len(moved) > 0.9 * len(other["first"])


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("shared")])
def test_saved_again_it_is_the_same_folder_bit_for_bit(found, case):
    """Numbered experts are saved stacked."""
    given, first, kind = found[case]["given"], found[case]["first"], case.partition("_")[0]
    assert first.keys() == given.keys()
    assert all(torch.equal(first[name], given[name]) for name in given)
    config = found[case]["config"]
    for name in (name.removeprefix("base_model.model.") for name in given if name.endswith("A.weight")):
        if ".experts" in name:
            continue
        module = name.removesuffix(".lora_A.weight")
        ranks = [own for key, own in config["rank_pattern"].items() if matches(key, module)] or [config["r"]]
        alphas = [own for key, own in config["alpha_pattern"].items() if matches(key, module)]
        assert ranks == [rank_of(kind, module)]
        assert math.isclose((alphas or [config["lora_alpha"]])[0] / ranks[0], factor_of(kind, module))


def matches(key: str, module: str) -> bool:
    return key.replace("\\", "").removesuffix(".weight") == module


def test_of_a_fused_layer_only_what_the_folder_adapts_is_trained(found):
    """Rows of k have no adapter, and the columns of q's B are zero in rows of v."""
    gradient = found["one_alone"]["gradients"]["decoder.layers.0.self_attention.linear_qkv.b"]
    rows = gradient.view(4, 4, 8, 7)  # groups, [q q k v], head size, q's rank and v's
    assert rows[:, :2, :, :4].abs().min() > 0
    assert rows[:, 3, :, 4:].abs().min() > 0
    assert not rows[:, 2].any()
    assert not rows[:, :2, :, 4:].any()
    assert not rows[:, 3, :, :4].any()
    assert not found["one_alone"]["gradients"]["decoder.layers.1.self_attention.linear_qkv.b"].any()
