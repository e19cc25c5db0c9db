"""A run from a YAML file with a model that has no family: trained under FSDP2, resumed exactly, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked import run_forked, run_ranks
from small_run import PROGRAM, environment, metrics_of, write_run
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

pytestmark = pytest.mark.distributed
PATHS = {"PYTHONPATH": environment()["PYTHONPATH"]}


def write_granite_run(folder: Path, **trainer: object) -> Path:
    """`write_run`, with a Granite in place of its Llama."""
    actor = {"optimizer": {"learning_rate": 3e-3, "warmup_steps": 2}, "sampling": {"n": 4, "max_tokens": 5}}
    values = {"output_dir": str(folder / "out"), "num_steps": 5, "save_every": 3, "export": False} | trainer
    config = write_run(folder, actor=actor, trainer=values)
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    granite = GraniteConfig(
        vocab_size=16, num_key_value_heads=2, max_position_embeddings=64, logits_scaling=2.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, dtype="float32", **sizes,
    )  # fmt: skip
    (folder / "model" / "generation_config.json").unlink()
    GraniteForCausalLM(granite).save_pretrained(folder / "model")
    return config


def test_a_run_is_checked_trained_resumed_exactly_and_exported(tmp_path):
    whole = write_granite_run(tmp_path / "whole", export=True)
    checked = run_forked("-m", "megatron_rl", "train", whole, "--check", **PATHS)
    assert checked.code == 0, checked.err
    refused = run_forked("-m", "megatron_rl", "train", whole, "--check", "parallel.tp=2", **PATHS)
    assert refused.code == 2
    assert "backend fsdp2 is data parallel only" in refused.err
    run_ranks(PROGRAM, 2, whole, **PATHS)
    expected = metrics_of(tmp_path / "whole" / "out")
    assert len(expected) >= 5
    model = AutoModelForCausalLM.from_pretrained(next((tmp_path / "whole" / "out").glob("**/model.safetensors")).parent)
    assert isinstance(model, GraniteForCausalLM)

    checkpoint = tmp_path / "whole" / "out" / "checkpoints" / "step_000005"
    run_ranks("-m", 1, "megatron_rl", "convert", checkpoint, tmp_path / "converted", "--to", "hf", **PATHS)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").state_dict()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in model.state_dict().items())
    started = write_granite_run(tmp_path / "started", num_steps=1)
    run_ranks(PROGRAM, 1, started, f"model={checkpoint}", **PATHS)

    halves = write_granite_run(tmp_path / "halves", num_steps=3)
    run_ranks(PROGRAM, 2, halves, **PATHS)
    run_ranks(PROGRAM, 2, halves, "trainer.num_steps=5", **PATHS)
    assert metrics_of(tmp_path / "halves" / "out") == expected
