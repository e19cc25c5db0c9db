"""Which model a Megatron checkpoint holds: told by its arguments, by a config, or refused with the reason."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.oracle import LLAMA, QWEN2, QWEN3_MOE, megatron_by_hand, random_logical
from safetensors.torch import load_file, save_file
from stored_arguments import change_common, forget_arguments

from megatron_rl.config import ConfigError
from megatron_rl.engines.conversion import convert
from megatron_rl.models import Architecture
from megatron_rl.models.hf_config import hf_config_from
from megatron_rl.models.inert_load import load_inert
from megatron_rl.models.job_arguments import (
    LLAMA3_SCALING,
    architecture_from_arguments,
    arguments_from_architecture,
    arguments_to_add,
)
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint

SCALED = replace(LLAMA, rope_scaling=tuple(sorted(LLAMA3_SCALING.items())), rope_theta=5e5)
ALL_EXPERTS = replace(QWEN3_MOE, experts=replace(QWEN3_MOE.experts, dense_layers=()))


def write_hf(architecture: Architecture, folder: Path) -> dict[str, torch.Tensor]:
    full = random_logical(architecture)
    folder.mkdir(parents=True)
    save_file(full, folder / "model.safetensors", {"format": "pt"})
    hf_config_from(architecture, dtype="float32").save_pretrained(folder)
    return full


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A run of Megatron-LM as far as its checkpoint tells: arguments, and no description of ours."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_hf(LLAMA, folder / "hf")
    convert(folder / "hf", folder / "run", "megatron")
    shutil.rmtree(folder / "run" / "release" / "hf")
    return folder / "run"


@pytest.fixture
def changed(checkpoint, tmp_path):
    """Makes a copy of the checkpoint whose arguments are changed."""

    def make(**values: object) -> Path:
        shutil.copytree(checkpoint, tmp_path / "run")
        change_common(tmp_path / "run" / "release", lambda common: vars(common["args"]).update(values))
        return tmp_path / "run"

    return make


@pytest.mark.parametrize("given", ["run", "iteration"])
def test_a_checkpoint_with_arguments_needs_no_config(checkpoint, tmp_path, given):
    source = checkpoint if given == "run" else checkpoint / "release"
    convert(source, tmp_path / "back", "hf")
    found, full = load_file(tmp_path / "back" / "model.safetensors"), random_logical(LLAMA)
    assert sorted(found) == sorted(full)
    for name in full:  # rows that pad the vocabulary stay: nothing in a checkpoint tells them apart
        assert torch.equal(found[name][: len(full[name])], full[name])
    assert len(found["lm_head.weight"]) == 128


@pytest.mark.parametrize("a", [LLAMA, QWEN2, SCALED, QWEN3_MOE, ALL_EXPERTS], ids=str)
def test_arguments_and_architecture_say_the_same(a):
    arguments = arguments_from_architecture(a, ParallelSizes(tp=2), 128, torch.bfloat16)
    assert architecture_from_arguments(arguments, a.vocab) == a
    flags = " ".join(arguments_to_add(arguments))
    assert f"--norm-epsilon {a.norm_eps!r}" in flags
    assert ("--qk-layernorm" in flags) == a.qk_norm
    assert ("--use-rope-scaling" in flags) == bool(a.rope_scaling)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type learned_absolute"),
        ({"use_rope_scaling": True, "rope_scaling_factor": 32.0}, "--rope-scaling-factor 32.0"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers 1"),
        ({"multi_latent_attention": True, "layernorm_epsilon": 1e-6}, "qk_layernorm=False"),
        ({"squared_relu": True}, "--squared-relu True"),
        ({"spec": ["my_layers", "spec"]}, "--spec"),
        ({"moe_something_new": 3}, "--moe-something-new 3"),
        ({"rotary_base": None}, "lack rotary_base"),
        ({"normalization": "LayerNorm"}, "LayerNorm"),
    ],
    ids=str,
)
def test_an_argument_that_makes_another_model_is_refused_by_name(changed, tmp_path, values, named):
    with pytest.raises(ConfigError) as error:
        convert(changed(**values), tmp_path / "back", "hf")
    assert named in str(error.value)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": 1e6}, "rope_theta=1000000.0, but rotary_base=10000.0"),
        ({"norm_eps": 1e-3}, "rms_norm_eps=0.001, but layernorm_epsilon=1e-06"),
        ({"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}, "num_attention_heads=4, but num_attention_heads=8"),
        ({"rope_scaling": (("factor", 2.0), ("rope_type", "linear"))}, "rope_parameters"),
    ],
    ids=str,
)
def test_a_config_of_equal_shapes_that_contradicts_the_arguments_is_refused(checkpoint, tmp_path, change, said):
    hf_config_from(replace(LLAMA, **change), dtype="float32").save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError) as error:
        convert(checkpoint, tmp_path / "back", "hf", config=tmp_path / "other")
    assert said in str(error.value)
    assert "--config" in str(error.value)
    with pytest.raises(ConfigError, match="model_config_path"):
        MegatronCheckpoint.find(checkpoint, tmp_path / "other")


def test_a_fitting_config_is_taken(checkpoint, tmp_path):
    hf_config_from(LLAMA, dtype="float32").save_pretrained(tmp_path / "same")
    convert(checkpoint, tmp_path / "back", "hf", config=tmp_path / "same")
    assert len(load_file(tmp_path / "back" / "model.safetensors")["lm_head.weight"]) == LLAMA.vocab


def test_a_checkpoint_without_arguments_says_which_flag_to_pass(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run")
    forget_arguments(tmp_path / "run" / "release")
    with pytest.raises(ConfigError, match="pass --config with"):
        convert(tmp_path / "run", tmp_path / "back", "hf")


def test_a_pointer_that_leads_nowhere_is_said(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(ConfigError, match=r"says '12', but .*iter_0000012 holds no checkpoint"):
        convert(tmp_path / "run", tmp_path / "back", "hf")


def write_legacy(a: Architecture, folder: Path, sizes: ParallelSizes) -> dict[str, torch.Tensor]:
    """The files of Megatron-LM's format torch, made by hand (names: checkpointing.py get_checkpoint_name)."""
    full, grid = random_logical(a), RankGrid(sizes, sizes.tp * sizes.pp * sizes.ep)
    arguments = arguments_from_architecture(a, sizes, 128 * sizes.tp, torch.float32)
    arguments.world_size = grid.world_size
    arguments.virtual_pipeline_model_parallel_size = sizes.vpp if sizes.vpp > 1 else None
    for rank in range(grid.world_size):
        at = grid.coordinates(rank)
        if at.edp:
            continue
        state = {"args": arguments, "checkpoint_version": 3.0, "iteration": 7}
        for name, tensor in megatron_by_hand(a, full, grid, rank, 128 * sizes.tp).items():
            chunk, _, rest = name.partition(".") if sizes.vpp > 1 else ("chunk", "", name)
            state.setdefault(chunk.replace("chunk", "model"), {})[rest] = tensor.clone()
        parts = [f"mp_rank_{at.tp:02d}"] + [f"{at.pp:03d}"] * (sizes.pp > 1) + [f"{at.ep:03d}"] * (sizes.ep > 1)
        place = folder / "iter_0000007" / "_".join(parts)
        place.mkdir(parents=True, exist_ok=True)
        torch.save(state, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    return full


@pytest.mark.parametrize(
    ("a", "sizes"),
    [
        (LLAMA, ParallelSizes()),
        (LLAMA, ParallelSizes(tp=4, etp=4)),
        (QWEN2, ParallelSizes(tp=2, pp=2, etp=2)),
        (LLAMA, ParallelSizes(pp=2, vpp=2)),
        (QWEN3_MOE, ParallelSizes(ep=2, pp=2)),
        (QWEN3_MOE, ParallelSizes(tp=2, ep=2, etp=2)),
        (ALL_EXPERTS, ParallelSizes(tp=2, ep=2, etp=1)),
    ],
    ids=lambda x: x.family if isinstance(x, Architecture) else str(x),
)
def test_files_of_the_format_torch_are_read_in_every_layout(a, sizes, tmp_path):
    full = write_legacy(a, tmp_path / "run", sizes)
    convert(tmp_path / "run", tmp_path / "back", "hf")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert sorted(found) == sorted(full)
    assert all(torch.equal(found[name][: len(full[name])], full[name]) for name in full)


def test_what_is_missing_or_unknown_among_such_files_is_named(tmp_path):
    write_legacy(LLAMA, tmp_path / "run", ParallelSizes(tp=2, etp=2))
    second = tmp_path / "run" / "iter_0000007" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(second, weights_only=False)
    content["model"]["decoder.layers.0.mlp.linear_fc1.bias"] = torch.zeros(2)
    torch.save(content, second)
    with pytest.raises(ConfigError, match=r"holds decoder.layers.0.mlp.linear_fc1.bias, which the described model"):
        convert(tmp_path / "run", tmp_path / "back", "hf")
    second.unlink()
    with pytest.raises(ConfigError, match=r"mp_rank_01.*does not exist"):
        convert(tmp_path / "run", tmp_path / "back", "hf")


@pytest.mark.parametrize(("name", "rows"), [("output_layer.weight", 1), ("value_head.weight", 1)])
def test_a_value_head_in_such_files_is_refused(name, rows, tmp_path):
    write_legacy(LLAMA, tmp_path / "run", ParallelSizes(pp=2))
    last = tmp_path / "run" / "iter_0000007" / "mp_rank_00_001" / "model_optim_rng.pt"
    content = torch.load(last, weights_only=False)
    content["model"][name] = torch.zeros(rows, LLAMA.hidden)
    torch.save(content, last)
    with pytest.raises(ConfigError, match=r"holds a value head.* --ckpt-format torch_dist"):
        convert(tmp_path / "run", tmp_path / "back", "hf")


class Touch:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.system, (f"touch {self.path}",)


class Call(Touch):
    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("kind", [Touch, Call])
def test_nothing_in_a_file_is_run(kind, tmp_path):
    torch.save({"args": kind(tmp_path / "ran"), "weight": torch.ones(2)}, tmp_path / "file.pt")
    with contextlib.suppress(ConfigError):  # refused, or read without what it would run
        assert torch.equal(load_inert(tmp_path / "file.pt")["weight"], torch.ones(2))
    assert not (tmp_path / "ran").exists()
