"""Saving Hugging Face folders from any layout: bitwise round trips, files of bounded size, all or nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.oracle import ALL, LLAMA, QWEN2, QWEN3_MOE, random_logical
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig
from weights.ranks import all_well, on_ranks

from megatron_rl.config import ConfigError
from megatron_rl.models import Architecture, hf_layout, megatron_layout, rollout_layout
from megatron_rl.models.hf_config import hf_config_from
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.parallel.agreement import PeerError
from megatron_rl.reshard import Layout, LocalTransport, WireFormat
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.hf_folder import HFFolderWriter, plan_files
from megatron_rl.weights.hf_in import load_folder, read_architecture
from megatron_rl.weights.hf_out import save_hf
from megatron_rl.weights.source import in_memory


def local_tensors(a: Architecture, layout: Layout, rank: int, full: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = empty_tensors(layout, rank, torch.float32)
    fill(layout, rank, tensors, in_memory(full, hf_layout(a)))
    return tensors


def save_from(a: Architecture, layout: Layout, folder: Path, full: dict[str, Tensor], **options: object) -> list:
    def work(rank: int, transport: object) -> Path:
        tensors = local_tensors(a, layout, rank, full)
        return save_hf(layout, tensors, a, folder, rank=rank, transport=transport, **options)  # type: ignore[arg-type]

    return on_ranks(len(layout.replica_of), work)


def read_files(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


GRIDS = [
    (ParallelSizes(), 1),
    (ParallelSizes(tp=2, pp=2), 4),
    (ParallelSizes(tp=2, pp=2, vpp=2, cp=2), 8),
    (ParallelSizes(tp=8), 8),
    (ParallelSizes(pp=3), 3),
]
MOE_GRIDS = [(ParallelSizes(tp=2, ep=2, etp=2), 4), (ParallelSizes(tp=2, ep=4, pp=2), 8)]
CASES = [(a, *grid) for a in ALL for grid in (MOE_GRIDS if a is QWEN3_MOE else GRIDS)]


@pytest.mark.parametrize(("architecture", "sizes", "world"), CASES, ids=lambda v: getattr(v, "family", str(v)))
def test_hugging_face_to_megatron_and_back_is_bitwise(
    architecture: Architecture, sizes: ParallelSizes, world: int, tmp_path
) -> None:
    full = random_logical(architecture)
    layout = megatron_layout(architecture, RankGrid(sizes, world), padded_vocab=64)
    all_well(save_from(architecture, layout, tmp_path / "out", full, max_shard_bytes=20_000))
    found = read_files(tmp_path / "out")
    assert sorted(found) == sorted(full)
    assert all(torch.equal(found[name], full[name]) for name in full)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # nothing left beside it


def test_rollout_shards_with_repeated_heads_save_the_same(tmp_path) -> None:
    full = random_logical(LLAMA)
    layout = rollout_layout(LLAMA, 8, [list(range(8))])
    all_well(save_from(LLAMA, layout, tmp_path / "out", full))
    found = read_files(tmp_path / "out")
    assert all(torch.equal(found[name], full[name]) for name in full)


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.family)
@pytest.mark.parametrize("max_shard_bytes", [20_000, 1 << 30], ids=["several files", "one file"])
def test_transformers_loads_the_folder_as_it_is(architecture: Architecture, max_shard_bytes: int, tmp_path) -> None:
    full = random_logical(architecture)
    layout = megatron_layout(architecture, RankGrid(ParallelSizes(tp=2), 2), 64)
    all_well(save_from(architecture, layout, tmp_path / "m", full, max_shard_bytes=max_shard_bytes))
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (max_shard_bytes == 20_000)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    tied = model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied == architecture.tied
    model.save_pretrained(tmp_path / "again")
    found = read_files(tmp_path / "again")
    assert all(torch.equal(found[name], full[name]) for name in full)
    assert read_architecture(tmp_path / "m") == architecture


def test_the_config_also_has_the_keys_that_older_engines_read(tmp_path) -> None:
    layout = megatron_layout(QWEN3_MOE, RankGrid(ParallelSizes(), 1), 64)
    all_well(save_from(QWEN3_MOE, layout, tmp_path / "m", random_logical(QWEN3_MOE), dtype=torch.bfloat16))
    fields = json.loads((tmp_path / "m" / "config.json").read_text())
    assert fields["num_experts"] == fields["num_local_experts"] == 8
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == 10000.0
    assert fields["architectures"] == ["Qwen3MoeForCausalLM"]
    assert fields["torch_dtype"] == fields["dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(tmp_path / "m").num_experts == 8


def test_scaled_rotary_embeddings_survive_both_spellings(tmp_path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_theta": 5e5, **scaling, "original_max_position_embeddings": 64}
    config = hf_config_from(LLAMA, dtype="float32")
    config.rope_parameters = rope
    config.save_pretrained(tmp_path / "config")
    a = read_architecture(tmp_path / "config")
    layout = megatron_layout(a, RankGrid(ParallelSizes(), 1), 64)
    all_well(save_from(a, layout, tmp_path / "m", random_logical(a), hf_config=config.to_dict()))
    assert json.loads((tmp_path / "m" / "config.json").read_text())["rope_scaling"]["factor"] == 8.0
    assert AutoConfig.from_pretrained(tmp_path / "m").rope_parameters == rope


def test_the_models_own_config_tokenizer_and_generation_settings_travel(llama_folder, tmp_path) -> None:
    a, config = read_architecture(llama_folder), LlamaConfig.from_pretrained(llama_folder)
    layout = megatron_layout(a, RankGrid(ParallelSizes(), 1), 512)
    tensors = empty_tensors(layout, 0, torch.float32)
    load_folder(llama_folder, layout, 0, tensors)
    save_hf(
        layout,
        tensors,
        a,
        tmp_path / "m",
        rank=0,
        transport=LocalTransport(),
        hf_config=config.to_dict(),
        tokenizer=AutoTokenizer.from_pretrained(llama_folder),
        generation_config=GenerationConfig.from_pretrained(llama_folder),
    )
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (llama_folder, tmp_path / "m"))
    assert new.generation_config.eos_token_id == [1, 2]
    ids = AutoTokenizer.from_pretrained(tmp_path / "m")("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(old(ids).logits, new(ids).logits)
    ignored = {"_name_or_path", "transformers_version", "torch_dtype"}
    before, after = ({k: v for k, v in m.config.to_dict().items() if k not in ignored} for m in (old, new))
    assert before == {key: after[key] for key in before}


def test_a_config_of_another_model_is_refused_and_nothing_is_left(tmp_path) -> None:
    layout = megatron_layout(LLAMA, RankGrid(ParallelSizes(), 1), 64)
    other = hf_config_from(replace(LLAMA, rope_theta=5e5), dtype="float32")
    (result,) = save_from(LLAMA, layout, tmp_path / "m", random_logical(LLAMA), hf_config=other)
    assert isinstance(result, ConfigError)
    assert not list(tmp_path.iterdir())


def test_files_keep_to_the_limit_and_hold_each_tensor_once() -> None:
    tensors = {"a": (10, 10), "b": (5,), "c": (100, 10), "d": (5, 2)}
    files = plan_files(tensors, WireFormat(torch.float32), max_bytes=450)
    assert [list(file.tensors) for file in files] == [["a", "b"], ["c"], ["d"]]
    assert [file.num_bytes for file in files] == [420, 4000, 40]
    assert files[0].name == "model-00001-of-00003.safetensors"


def test_an_existing_folder_is_kept_unless_overwriting_is_allowed(tmp_path) -> None:
    layout, full = megatron_layout(QWEN2, RankGrid(ParallelSizes(tp=2), 2), 64), random_logical(QWEN2)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    first, second = save_from(QWEN2, layout, tmp_path / "m", full)
    assert isinstance(first, ConfigError)
    assert isinstance(second, PeerError)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    all_well(save_from(QWEN2, layout, tmp_path / "m", full, overwrite=True))
    assert not (tmp_path / "m" / "notes.txt").exists()
    assert read_architecture(tmp_path / "m") == QWEN2


def test_a_failing_rank_leaves_nothing_behind_and_nobody_waiting(tmp_path, monkeypatch) -> None:
    write = HFFolderWriter.write

    def full_disk(self, file, tensors):
        if file is self.files[1]:
            raise OSError("no space left on device")
        write(self, file, tensors)

    monkeypatch.setattr(HFFolderWriter, "write", full_disk)
    layout = megatron_layout(LLAMA, RankGrid(ParallelSizes(tp=2), 2), 64)
    first, second = save_from(LLAMA, layout, tmp_path / "m", random_logical(LLAMA), max_shard_bytes=10_000)
    assert isinstance(second, OSError)
    assert isinstance(first, PeerError)
    assert "rank 1 failed" in str(first)
    assert not list(tmp_path.iterdir())


def test_what_a_broken_attempt_left_is_removed(tmp_path) -> None:
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "model-00009-of-00009.safetensors").write_text("old")
    layout = megatron_layout(LLAMA, RankGrid(ParallelSizes(), 1), 64)
    all_well(save_from(LLAMA, layout, tmp_path / "m", random_logical(LLAMA)))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_a_value_model_cannot_be_saved_as_a_language_model(tmp_path) -> None:
    layout = megatron_layout(LLAMA, RankGrid(ParallelSizes(), 1), 64, output_layer=False)
    (result,) = save_from(LLAMA, layout, tmp_path / "m", random_logical(LLAMA))
    assert isinstance(result, ConfigError)
    assert "first 'lm_head.weight'" in str(result)


def test_ranks_on_different_file_systems_are_found_out(tmp_path, monkeypatch) -> None:
    commit = HFFolderWriter.commit

    def elsewhere(self):
        (self.partial / self.files[1].name).unlink()
        commit(self)

    monkeypatch.setattr(HFFolderWriter, "commit", elsewhere)
    layout = megatron_layout(LLAMA, RankGrid(ParallelSizes(tp=2), 2), 64)
    first, _ = save_from(LLAMA, layout, tmp_path / "m", random_logical(LLAMA), max_shard_bytes=10_000)
    assert "all ranks must see one file system" in str(first)
    shutil.rmtree(tmp_path / ".m.partial", ignore_errors=True)
    assert not (tmp_path / "m").exists()
