"""Which folders of adapters are read, how their configs are understood, and how others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models.oracle import LLAMA
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.engines.engine_config import LoraConfig
from megatron_rl.models.peft_adapters import PeftAdapters
from megatron_rl.models.peft_config import PeftConfig
from megatron_rl.models.starting_adapters import StartingAdapters

SMALL = replace(LLAMA, num_layers=2)
NAME = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
Q_ROWS = SMALL.num_heads * SMALL.head_dim
LAYERS = ("linear_qkv", "linear_proj")


def folder(path: Path, **fields: Any) -> Path:
    """Adapters of q_proj and o_proj in both layers."""
    tensors = {}
    for layer in range(2):
        for name, rows, cols in (("q_proj", Q_ROWS, SMALL.hidden), ("o_proj", SMALL.hidden, Q_ROWS)):
            tensors |= {
                NAME.format(layer, name, "A"): torch.ones(2, cols),
                NAME.format(layer, name, "B"): torch.ones(rows, 2),
            }
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "o_proj"]} | fields
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def changed(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def test_a_folder_is_read_by_the_models_own_names(tmp_path) -> None:
    adapters = PeftAdapters(folder(tmp_path), SMALL)
    assert sorted(adapters.tensors) == [
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(2) for name in "oq"
    ]
    entry = adapters.entry("model.layers.1.self_attn.o_proj.weight")
    assert entry is not None
    assert (entry.rank, entry.factor, entry.inputs, entry.outputs) == (2, 1.5, Q_ROWS, SMALL.hidden)
    assert adapters.entry("model.layers.1.self_attn.k_proj.weight") is None
    starting = StartingAdapters(adapters, SMALL, LAYERS)
    assert (starting.targets, starting.has("decoder.layers.7.mlp.linear_fc1")) == (sorted(LAYERS), False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected 'LORA'"),
        ({"use_dora": True}, "use_dora=True: only plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        (
            {"target_modules": ["q_proj"]},
            r"4 .*|2 modules that the model has not, or that adapter_config.json does not",
        ),
        ({"target_modules": ["q_proj", "o_proj", "k_proj"]}, "lacks adapters of model.layers.0.self_attn.k_proj"),
        ({"r": 4}, r"lora_A.weight has shape \[2, 24\], but the base and rank 4 of adapter_config.json"),
    ],
)
def test_configs_that_ask_for_more_or_other_than_the_file_has_are_refused(tmp_path, fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        PeftAdapters(folder(tmp_path, **fields), SMALL)


def test_files_that_do_not_fit_the_base_are_refused_with_names_and_shapes(tmp_path) -> None:
    cases: list[tuple[Callable[[dict[str, Tensor]], Any], str]] = [
        (
            lambda t: t.pop(NAME.format(1, "q_proj", "B")),
            r"layers.1.self_attn.q_proj has lora_A \[2, 24\], but no lora_B",
        ),
        (lambda t: t.update({NAME.format(0, "q_proj", "A"): torch.ones(2, 9)}), r"has shape \[2, 9\], but the base"),
        (
            lambda t: t.update({"x.lora_embedding_A": torch.ones(2, 9)}),
            r"tensor x.lora_embedding_A \[2, 9\] is no A or B",
        ),
        (
            lambda t: [t.update({NAME.format(8, "q_proj", x): torch.ones(2, 9)}) for x in "AB"],
            r"1 modules that the model has not.*layers.8.self_attn.q_proj \(B \[2, 9\]\)",
        ),
    ]
    for number, (change, message) in enumerate(cases):
        own = tmp_path / str(number)
        own.mkdir()
        with pytest.raises(ConfigError, match=message):
            PeftAdapters(changed(folder(own), change), SMALL)


def test_folders_without_files_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"has no adapter_config.json: expected a folder that PEFT wrote"):
        PeftAdapters(tmp_path, SMALL)
    (folder(tmp_path) / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match=r"adapter_model.safetensors cannot be read"):
        PeftAdapters(tmp_path, SMALL)


@pytest.mark.parametrize("text", ["[1, 2]", '"lora"', "{", ""])
def test_a_config_that_is_no_object_is_refused(tmp_path, text) -> None:
    (folder(tmp_path) / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"adapter_config.json is not a JSON object"):
        PeftConfig.read(tmp_path)


def test_layers_that_have_no_adapters_in_megatron_are_refused(tmp_path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        for letter, shape in (("A", (2, SMALL.hidden)), ("B", (SMALL.vocab, 2))):
            tensors[f"base_model.model.lm_head.lora_{letter}.weight"] = torch.ones(shape)

    own = changed(folder(tmp_path, target_modules=["q_proj", "o_proj", "lm_head"]), add)
    adapters = PeftAdapters(own, replace(SMALL, tied=False))
    with pytest.raises(ConfigError, match=r"has adapters of lm_head.weight, which can have none here"):
        StartingAdapters(adapters, replace(SMALL, tied=False), LAYERS)


def test_patterns_are_matched_as_peft_matches_them(tmp_path) -> None:
    fields = {
        "use_rslora": True,
        "rank_pattern": {"k_proj": 9, r"layers\.1\.self_attn\.q_proj": 4},
        "alpha_pattern": {"o_proj": 8},
        "layers_to_transform": [1],
        "exclude_modules": r".*\.o_proj",
    }
    config = PeftConfig.read(folder(tmp_path, **fields))
    q, o = ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.o_proj")
    assert (config.rank_of(q), config.rank_of(o), config.rank_of("x.k_proj")) == (4, 2, 9)
    assert config.factor_of(q) == 3 / 2
    assert config.factor_of(o) == 8 / 2**0.5
    assert [config.chooses(name) for name in (q, o, q.replace("1", "0"))] == [True, False, False]


def test_a_path_says_rank_alpha_and_targets_itself() -> None:
    with pytest.raises(ConfigError, match="path=x was given with rank, alpha, which that folder says: leave it out"):
        LoraConfig.parse({"path": "x", "rank": 8, "alpha": 1.0}, where="lora")
    given = LoraConfig(path="x")
    assert LoraConfig.parse(given.model_dump(), where="lora") == given
