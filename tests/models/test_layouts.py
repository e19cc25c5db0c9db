"""Layouts against shards sliced by hand, bitwise, over the grid of parallel sizes; and the refusals."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from models.oracle import (
    ALL,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE,
    LLAMA,
    MISTRAL,
    MIXTRAL,
    MOONLIGHT,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    megatron_by_hand,
    random_logical,
    rollout_by_hand,
)

from megatron_rl.config import ConfigError
from megatron_rl.models import Architecture, MegatronNaming, hf_layout, megatron_layout, rollout_layout
from megatron_rl.models.layouts import rollout_vocab
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard.layout import Layout
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.source import in_memory


def filled(layout: Layout, rank: int, full: dict[str, torch.Tensor], architecture: Architecture) -> dict:
    tensors = empty_tensors(layout, rank, torch.float32)
    for tensor in tensors.values():
        tensor.fill_(float("nan"))  # padding must be written too
    fill(layout, rank, tensors, in_memory(full, hf_layout(architecture)))
    return tensors


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


DENSE_GRIDS = [
    (ParallelSizes(), 1),
    (ParallelSizes(tp=2), 4),
    (ParallelSizes(tp=4, pp=2), 8),
    (ParallelSizes(pp=2, vpp=2), 2),
    (ParallelSizes(tp=2, pp=2, vpp=2, cp=2), 8),
    (ParallelSizes(pp=3), 3),  # uneven: 4 layers
    (ParallelSizes(tp=8), 8),  # more ranks than key/value heads
]
MOE_GRIDS = [
    (ParallelSizes(), 1),
    (ParallelSizes(ep=4), 4),
    (ParallelSizes(tp=2, ep=2, pp=2), 8),
    (ParallelSizes(tp=2, ep=2, etp=2), 4),
    (ParallelSizes(tp=4, ep=2, pp=2, vpp=2), 16),
]
CASES = [(a, *grid) for a in (LLAMA, QWEN2, QWEN3, MISTRAL) for grid in DENSE_GRIDS]
MIXTURES = (QWEN3_MOE, MIXTRAL, QWEN2_MOE, GLM4_MOE, DEEPSEEK_V3, DEEPSEEK_V2, MOONLIGHT)
CASES += [(a, *grid) for a in MIXTURES for grid in MOE_GRIDS]


@pytest.mark.parametrize(("architecture", "sizes", "world"), CASES, ids=lambda v: getattr(v, "family", str(v)))
def test_megatron_layout_equals_slicing_by_hand(architecture: Architecture, sizes: ParallelSizes, world: int) -> None:
    grid, full = RankGrid(sizes, world), random_logical(architecture)
    layout = megatron_layout(architecture, grid, padded_vocab=64)
    for rank in range(world):
        expected = megatron_by_hand(architecture, full, grid, rank, 64)
        assert_same(filled(layout, rank, full, architecture), expected)


def test_ranks_with_equal_shards_share_a_replica_group_and_others_do_not() -> None:
    layout = megatron_layout(LLAMA, RankGrid(ParallelSizes(tp=2, pp=2, cp=2), 16), padded_vocab=64)
    grid = RankGrid(ParallelSizes(tp=2, pp=2, cp=2), 16)
    expected = sorted(grid.ranks(tp=tp, pp=pp) for tp in range(2) for pp in range(2))
    assert sorted(layout.replicas.values()) == expected


ROLLOUTS = [(1, 1), (2, 1), (4, 1), (8, 1)]
ROLLOUT_CASES = [(a, *sizes) for a in ALL for sizes in ROLLOUTS]
ROLLOUT_CASES += [(a, 4, ep) for a in MIXTURES for ep in (2, 4)]


@pytest.mark.parametrize(("architecture", "tp", "ep"), ROLLOUT_CASES, ids=lambda v: getattr(v, "family", str(v)))
def test_rollout_layout_equals_slicing_by_hand(architecture: Architecture, tp: int, ep: int) -> None:
    full = random_logical(architecture)
    replicas = [list(range(tp)), list(range(tp, 2 * tp))]
    layout = rollout_layout(architecture, tp, replicas, ep)
    for rank in range(2 * tp):
        expected = rollout_by_hand(architecture, full, rank % tp, tp, ep, padded={8: 64}.get(tp, 64))
        assert_same(filled(layout, rank, full, architecture), expected)


@pytest.mark.parametrize(
    ("vocab", "tp", "padded"), [(50, 1, 64), (64, 2, 64), (130, 2, 192), (130, 4, 192), (130, 8, 192), (130, 5, 320)]
)
def test_rollout_vocabulary_is_a_multiple_of_64_or_of_64_tp(vocab: int, tp: int, padded: int) -> None:
    assert rollout_vocab(vocab, tp) == padded


def test_a_rollout_rank_may_own_no_real_vocabulary_row() -> None:
    small = replace(LLAMA, vocab=3)
    shard = next(s for s in rollout_layout(small, 2, [[0, 1]]).shards(1) if s.name == "lm_head.weight")
    assert (shard.shape, shard.spans) == ((32, 24), ())


def test_fused_spelling_moves_norms_into_linear_layers_except_before_experts() -> None:
    naming = MegatronNaming(fused_norms=True, grouped_experts=True)
    layout = megatron_layout(QWEN3_MOE, RankGrid(ParallelSizes(ep=4), 4), 64, naming)
    names = {shard.name for shard in layout.shards(0)}
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in names  # the dense layer
    assert "decoder.layers.0.pre_mlp_layernorm.weight" in names  # an expert layer
    assert {
        "decoder.layers.0.mlp.experts.linear_fc1.weight1",
        "decoder.layers.3.mlp.experts.linear_fc2.weight0",
    } <= names
    assert not any("local_experts" in name or name.endswith("input_layernorm.weight") for name in names)
    assert MegatronNaming.detect(names) == naming


def test_local_spelling_is_detected() -> None:
    layout = megatron_layout(QWEN3_MOE, RankGrid(ParallelSizes(), 1), 64)
    assert MegatronNaming.detect(shard.name for shard in layout.shards(0)) == MegatronNaming()
    with pytest.raises(ValueError, match="GroupedMLP"):
        MegatronNaming.detect(["decoder.layers.0.mlp.experts.weight1"])


def test_a_value_model_has_no_output_layer() -> None:
    for architecture in (LLAMA, QWEN2):
        layout = megatron_layout(architecture, RankGrid(ParallelSizes(pp=2), 2), 64, output_layer=False)
        assert not any(shard.name == "output_layer.weight" for shard in layout.shards(1))


REFUSED = [
    (LLAMA, ParallelSizes(tp=3), 3, "number of attention heads 8 is not divisible by parallel.tp=3"),
    (replace(LLAMA, num_heads=12, num_kv_heads=6), ParallelSizes(tp=4), 4, "6 key/value heads and parallel.tp=4"),
    (replace(LLAMA, ffn=30), ParallelSizes(tp=4), 4, "intermediate size 30"),
    (LLAMA, ParallelSizes(pp=5), 5, "layers"),
    (LLAMA, ParallelSizes(vpp=2), 1, "needs parallel.pp"),
    (LLAMA, ParallelSizes(ep=2), 2, "llama has no experts"),
    (QWEN3_MOE, ParallelSizes(ep=16), 16, "number of experts 8 is not divisible by parallel.ep=16"),
    (QWEN3_MOE, ParallelSizes(etp=32), 32, "expert intermediate size 16"),
]


@pytest.mark.parametrize(("architecture", "sizes", "world", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_impossible_training_layouts_are_refused(
    architecture: Architecture, sizes: ParallelSizes, world: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        megatron_layout(architecture, RankGrid(sizes, world), padded_vocab=64 * world)


def test_impossible_rollout_layouts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"8 is not divisible by rollout.tp=3"):
        rollout_layout(LLAMA, 3, [])
    with pytest.raises(ConfigError, match=r"2 key/value heads and rollout.tp=3"):
        rollout_layout(replace(QWEN3, num_heads=6), 3, [])
    with pytest.raises(ConfigError, match="has 1 ranks, expected tp=2"):
        rollout_layout(LLAMA, 2, [[0]])
    with pytest.raises(ConfigError, match="rank 1 is in two rollout engines"):
        rollout_layout(LLAMA, 2, [[0, 1], [1, 2]])
    with pytest.raises(ConfigError, match=r"rollout.ep=2, but llama has no experts"):
        rollout_layout(LLAMA, 2, [], ep=2)


def test_padded_vocabulary_must_hold_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match="cannot hold 50 tokens"):
        megatron_layout(LLAMA, RankGrid(ParallelSizes(), 1), padded_vocab=49)
