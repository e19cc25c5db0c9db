"""What SGLang's classes usually make of a model's files: the shards of families, found by names alone."""

from __future__ import annotations

import pytest
from rollout.rollout_models import CONFIGS, architecture_of

from megatron_rl.models import logical_tensors, rollout_layout
from megatron_rl.models.usual_shards import usual_shards
from megatron_rl.reshard.layout import Span


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_names_alone_say_what_the_families_know(family: str) -> None:
    architecture = architecture_of(CONFIGS[family])
    found = usual_shards(logical_tensors(architecture), architecture.vocab)
    known = {shard.name: shard for shard in rollout_layout(architecture, 1, [[0]]).shards(0)}
    assert len(found) == len(known)
    for shard in found:
        assert shard.shape == known[shard.name].shape
        assert set(shard.spans) == set(known[shard.name].spans)


def test_what_belongs_together_travels_together_and_the_rest_alone() -> None:
    shapes = {
        "layers.0.q_a_proj.weight": (6, 4),
        "layers.0.conv.weight": (8, 1, 3),
        "layers.0.kv_a_proj_with_mqa.weight": (5, 4),
        "layers.0.q_proj.weight": (4, 4),  # no key and value: nothing to stack it with
        "layers.0.experts.0.w1.weight": (3, 4),  # no w3
        "embed_tokens.weight": (70, 4),
        "layers.1.embed_tokens.weight": (8, 4),  # of another size
    }
    found = {shard.name: shard for shard in usual_shards(shapes, 70)}
    assert list(found) == [
        "layers.0.fused_qkv_a_proj_with_mqa.weight",
        "layers.0.conv.weight",
        *list(shapes)[3:],
    ]
    stacked = found["layers.0.fused_qkv_a_proj_with_mqa.weight"]
    assert stacked.shape == (11, 4)
    assert stacked.spans[1] == Span("layers.0.kv_a_proj_with_mqa.weight", 0, 5, 0, 4, 6, 0)
    assert found["layers.0.conv.weight"].spans == (Span("layers.0.conv.weight", 0, 8, 0, 3, 0, 0),)
    assert found["embed_tokens.weight"].shape == (128, 4)
    assert found["layers.1.embed_tokens.weight"].shape == (8, 4)
