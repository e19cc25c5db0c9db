"""What is read off modules of `transformers`: the tensors of their files, from every family's too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines.fsdp2.tiny_models import CONFIGS, tiny_model
from models.oracle import ALL
from safetensors.torch import load_file

from megatron_rl.models import hf_config_from, logical_tensors, transformers_layout
from megatron_rl.models.hf_config import best_architecture
from megatron_rl.models.hf_module import architecture_of_config, stored_tensors
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.source import SafetensorsFolder, in_memory


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.family)
def test_a_family_s_tensors_are_those_of_its_module(architecture) -> None:
    """The description and transformers' own table name the same tensors, and place the module's rows alike."""
    module = architecture_of_config(hf_config_from(architecture))
    assert logical_tensors(module) == logical_tensors(architecture)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_files_written_by_transformers_are_read_and_written_bitwise(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    architecture, held = best_architecture(model.config), stored_tensors(model)
    files = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in files.items()} == logical_tensors(architecture)
    layout = transformers_layout(architecture)
    loaded = empty_tensors(layout, 0, torch.float32)
    with SafetensorsFolder(tmp_path) as source:
        fill(layout, 0, loaded, source)
    assert loaded.keys() == held.keys()
    assert all(torch.equal(tensor, held[name]) for name, tensor in loaded.items())
    source = in_memory({name: tensor.detach() for name, tensor in held.items()}, layout)
    assert all(name in source for name in files)
