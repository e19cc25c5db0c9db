"""Training ranks and rollout ranks of one job: two worlds, and a bridge that pushes cross."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked import run_ranks
from small_run import write_run
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

MIXTURE = Qwen3MoeConfig(
    vocab_size=16, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("split")
    write_run(folder)
    torch.manual_seed(5)
    Qwen3MoeForCausalLM(MIXTURE).save_pretrained(folder / "mixture")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "mixture")
    program = Path(__file__).with_name("split_world_program.py")
    return run_ranks(program, 6, folder / "model", folder / "mixture", timeout=280)


@pytest.mark.distributed
@pytest.mark.parametrize("half", ["training", "rollout"])
@pytest.mark.parametrize(
    "what",
    [
        "each half is a world of its own",
        "a push at the minimum of bytes, TP1",
        "a push at the minimum of bytes, TP2",
        "a push at the minimum of bytes, TP2 EP2",
        "refusal",
    ],
)
def test_rollout_ranks_beside_training_ranks(output: str, what: str, half: str) -> None:
    assert f"held: {what} ({half})" in output.splitlines()


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_two_replicas_and_one_of_two_ranks_sample_the_same(output: str, family: str) -> None:
    """So do expert-parallel ranks. They serve the same weights, and seeds belong to prompts."""
    one, two = (line for line in output.splitlines() if line.startswith(f"sampled: {family} "))
    assert one == two
