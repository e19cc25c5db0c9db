"""`megatron-rl convert` of a folder of adapters writes its base with the adapters merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import two_layers
from peft_folders import factor_of, numbered_update, peft_update, write_folder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.config import ConfigError
from megatron_rl.engines.conversion import convert

MODELS = {"latent": "deepseek_v3", "shared": "qwen2_moe", "oss": "gpt_oss"}


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_of_adapters_is_merged_into_the_base_that_it_names(kind: str, tmp_path: Path) -> None:
    base = two_layers(MODELS[kind], 256)
    base.save_pretrained(tmp_path / "base")
    write_folder(tmp_path / "adapters", kind, base)
    config = tmp_path / "adapters" / "adapter_config.json"
    with pytest.raises(ConfigError, match=r"names no base_model_name_or_path: give the base as --config"):
        convert(tmp_path / "adapters", tmp_path / "hf", "hf")
    fields = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(fields))
    convert(tmp_path / "adapters", tmp_path / "hf", "hf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    given = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    found = dict(merged.named_parameters())
    for name, weight in base.named_parameters():
        update = numbered_update(given, name)
        update = peft_update(given, name, weight) if update is None else update
        expected = weight.double()
        if update is not None:
            expected = expected + factor_of(kind, name.removesuffix(".weight")) * update
        assert (found[name].double() - expected).abs().max() <= (2e-6 if update is not None else 0), name


def test_a_checkpoint_is_made_of_the_merged_model_too(tmp_path: Path) -> None:
    base = two_layers("deepseek_v3", 256)
    base.save_pretrained(tmp_path / "base")
    write_folder(tmp_path / "adapters", "latent", base)
    for source, target, to, config in (
        ("adapters", "hf", "hf", "base"),
        ("adapters", "megatron", "megatron", "base"),
        ("megatron", "again", "hf", None),
    ):
        convert(tmp_path / source, tmp_path / target, to, config=config and tmp_path / config)
    one, again = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert one.keys() == again.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, again[name], atol=1e-6), name  # merged by other blocks of rows
