"""Conversion between Hugging Face folders and real Megatron distributed checkpoints, in one process."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines.megatron.model.parity_program import mixed_dtypes
from models.oracle import ALL, LLAMA, QWEN3_MOE, random_logical
from safetensors.torch import load_file, save_file
from stored_arguments import forget_arguments
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import megatron_rl
from megatron_rl.config import ConfigError
from megatron_rl.engines.conversion import convert
from megatron_rl.models import Architecture
from megatron_rl.models.hf_config import hf_config_from
from megatron_rl.models.stored_tensors import candidates

assert megatron_rl  # installs the CPU face before megatron.core is imported


def hf_folder(architecture: Architecture, folder: Path) -> dict[str, torch.Tensor]:
    full = random_logical(architecture)
    folder.mkdir()
    save_file(full, folder / "model.safetensors", {"format": "pt"})
    hf_config_from(architecture, dtype="float32").save_pretrained(folder)
    return full


def read_files(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.family)
def test_to_megatron_and_back_is_bitwise(architecture: Architecture, tmp_path) -> None:
    full = hf_folder(architecture, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron", "megatron")
    assert (tmp_path / "megatron" / "release" / "metadata.json").is_file()
    convert(tmp_path / "megatron", tmp_path / "back", "hf", max_shard_bytes=20_000)
    found = read_files(tmp_path / "back")
    assert sorted(found) == sorted(full)
    assert all(torch.equal(found[name], full[name]) for name in full)
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").dtype == torch.float32
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "megatron", "back"}


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.family)
def test_each_tensor_keeps_its_dtype_to_megatron_and_back(architecture: Architecture, tmp_path) -> None:
    full = mixed_dtypes(hf_folder(architecture, tmp_path / "hf"))
    save_file(full, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "back", "hf", max_shard_bytes=20_000)
    convert(tmp_path / "hf", tmp_path / "again", "hf")
    convert(tmp_path / "megatron", tmp_path / "half", "hf", dtype=torch.float16)
    for folder in ("back", "again"):
        found = read_files(tmp_path / folder)
        assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in full.items()}
        assert all(torch.equal(found[name], full[name]) for name in full)
    assert {tensor.dtype for tensor in full.values()} == {torch.bfloat16, torch.float32}
    assert {tensor.dtype for tensor in read_files(tmp_path / "half").values()} == {torch.float16}


def test_tensors_that_megatron_stores_as_one_get_the_widest_dtype_and_keep_their_values(tmp_path) -> None:
    full = {name: tensor.bfloat16() for name, tensor in hf_folder(LLAMA, tmp_path / "hf").items()}
    wide = "model.layers.2.self_attn.k_proj.weight"
    full[wide] = random_logical(LLAMA)[wide]
    save_file(full, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "hf", tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "back", "hf")
    for name, tensor in read_files(tmp_path / "back").items():
        fused = any(f"{letter}_proj" in name for letter in "qkv")
        assert tensor.dtype == (torch.float32 if fused else torch.bfloat16)
        assert torch.equal(tensor, full[name].to(tensor.dtype))


def test_a_reward_model_stays_the_classifier_that_it_is(tmp_path) -> None:
    full = hf_folder(replace(LLAMA, value_model=True), tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "back", "hf")
    found = read_files(tmp_path / "back")
    assert sorted(found) == sorted(full)
    assert all(torch.equal(found[name], full[name]) for name in full)
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path / "back")).__name__.startswith("Llama")


def test_a_real_model_keeps_its_tokenizer_and_its_words(llama_folder, tmp_path) -> None:
    convert(llama_folder, tmp_path / "megatron", "megatron")
    convert(tmp_path / "megatron", tmp_path / "back", "hf")
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (llama_folder, tmp_path / "back"))
    ids = AutoTokenizer.from_pretrained(tmp_path / "back")("Once upon a time", return_tensors="pt").input_ids
    assert torch.equal(old.generate(ids, max_new_tokens=20), new.generate(ids, max_new_tokens=20))
    assert new.generation_config.eos_token_id == [1, 2]


def test_hugging_face_to_hugging_face_changes_dtype_and_file_size(tmp_path) -> None:
    full = hf_folder(LLAMA, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "half", "hf", dtype=torch.bfloat16, max_shard_bytes=10_000)
    found = read_files(tmp_path / "half")
    assert all(torch.equal(found[name], full[name].bfloat16()) for name in full)
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 3


def test_a_checkpoint_that_does_not_say_what_it_holds_needs_a_config(tmp_path) -> None:
    full = hf_folder(LLAMA, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron", "megatron")
    shutil.rmtree(tmp_path / "megatron" / "release" / "hf")
    forget_arguments(tmp_path / "megatron" / "release")
    with pytest.raises(ConfigError, match="does not say what model it holds"):
        convert(tmp_path / "megatron", tmp_path / "back", "hf")
    convert(tmp_path / "megatron", tmp_path / "back", "hf", config=tmp_path / "hf" / "config.json")
    found = read_files(tmp_path / "back")
    assert all(torch.equal(found[name], full[name]) for name in full)


def test_a_run_folder_of_megatron_lm_stands_for_its_newest_iteration(tmp_path) -> None:
    hf_folder(LLAMA, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "run" / "iter_0000012", "megatron")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("12")
    convert(tmp_path / "run", tmp_path / "back", "hf")
    assert (tmp_path / "back" / "model.safetensors").is_file()


def test_a_config_of_another_model_is_refused_and_nothing_is_left(tmp_path) -> None:
    hf_folder(LLAMA, tmp_path / "hf")
    hf_folder(QWEN3_MOE, tmp_path / "other")
    convert(tmp_path / "hf", tmp_path / "megatron", "megatron")
    with pytest.raises(ConfigError, match="belongs to another model"):
        convert(tmp_path / "megatron", tmp_path / "back", "hf", config=tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "other", "megatron"}


def test_other_targets_and_existing_targets_are_refused(tmp_path) -> None:
    hf_folder(LLAMA, tmp_path / "hf")
    with pytest.raises(ConfigError, match="expected 'hf' or 'megatron'"):
        convert(tmp_path / "hf", tmp_path / "x", "gguf")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="exists and is not empty"):
        convert(tmp_path / "hf", tmp_path / "hf", "megatron")


def test_experts_may_be_stacked_by_layer_or_not() -> None:
    name = "decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight"
    assert list(candidates(name)) == [
        ("decoder.layers.mlp.experts.experts.linear_fc1.weight", (3, 5)),
        ("decoder.layers.3.mlp.experts.experts.linear_fc1.weight", (5,)),
    ]
