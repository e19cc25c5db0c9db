"""The comparison of a job's chunks with their export: right models pass, a wrong part is named, nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.engines.megatron import model_proof
from megatron_rl.engines.megatron.build import from_chunks
from megatron_rl.engines.megatron.engine import MegatronEngine
from megatron_rl.engines.megatron.model_proof import prove

from megatron_lm.job import JobArguments, float16, get_model, initialize, local_provider, transformer_config  # isort: skip
from megatron.core import parallel_state  # isort: skip

from megatron_rl.parallel import ParallelContext

VOCAB = 120  # 8 rows of the embedding are padding


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    if not dist.is_initialized():  # tests of other files share this process
        current_platform().init_process_group()
    parallel_state.destroy_model_parallel()
    initialize(JobArguments())
    yield
    parallel_state.destroy_model_parallel()


def taken(args: JobArguments, change: Callable[[nn.Module], None] = lambda chunk: None) -> MegatronEngine:
    """A job's chunks, changed in a way that no field tells, as they are taken over."""
    config = transformer_config(args)
    chunks = get_model(args, config, local_provider(args, config))
    with torch.no_grad():  # Megatron starts with 1 in all norms, and small outputs of every layer
        for parameter in chunks[0].parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise / 8 if parameter.dim() == 1 else noise / 5)
    change(chunks[0])
    return from_chunks(float16(args, config, list(chunks)), ParallelContext.from_parallel_state(parallel_state), VOCAB)


@pytest.mark.parametrize(
    "args",
    [
        JobArguments(),
        JobArguments(untie_embeddings_and_output_weights=False, bf16=True),
        JobArguments(fp16=True),
        JobArguments(num_experts=4, qk_layernorm=True),
        JobArguments(num_experts=4, qk_layernorm=True, bf16=True),
    ],
    ids=["fp32", "tied bf16", "fp16", "experts", "experts bf16"],
)
def test_a_right_model_is_far_below_the_limit_in_every_part(args):
    findings = prove(taken(args), packing=False)
    limit = model_proof.TOLERANCE[args.params_dtype]
    assert [finding.order for finding in sorted(findings, key=lambda f: f.order)] == [-1, 0, 1, 2, 3, 4, 5]
    assert max(finding.error for finding in findings) < limit / 3


def feed_forward(chunk: nn.Module) -> None:
    chunk.decoder.layers[2].mlp.linear_fc2.register_forward_hook(lambda module, args, out: (out[0] * 1.02, out[1]))


def scale(chunk: nn.Module) -> None:
    attention = chunk.decoder.layers[1].self_attention.core_attention
    attention.scale_mask_softmax.scale, attention.softmax_scale = 1.1, attention.softmax_scale * 1.2


def epsilon(chunk: nn.Module) -> None:
    chunk.decoder.layers[3].pre_mlp_layernorm.eps = 0.2


def positions(chunk: nn.Module) -> None:
    chunk.rotary_pos_emb.register_forward_hook(lambda module, args, out: out * 0.98)


def embedding(chunk: nn.Module) -> None:
    chunk.embedding.register_forward_hook(lambda module, args, out: out * 1.5)


def final_norm(chunk: nn.Module) -> None:
    chunk.decoder.final_layernorm.register_forward_hook(lambda module, args, out: out * 1.01)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (feed_forward, "layer 2 "),
        (scale, "layer 1 "),
        (epsilon, "layer 3 "),
        (positions, "layer 0 "),
        (embedding, "the embedding "),
        (final_norm, "the final norm "),
    ],
)
def test_the_first_part_that_differs_is_named(change, part):
    with pytest.raises(ConfigError, match=f"^{part}"):
        prove(taken(JobArguments(), change), packing=False)


def test_nothing_is_changed():
    model = taken(JobArguments())
    before, state = [p.clone() for p in model.chunks[0].parameters()], torch.get_rng_state()
    model.chunks[0].train()
    prove(model, packing=False)
    assert model.chunks[0].training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.chunks[0].parameters(), strict=True))
    assert all(p.grad is None for p in model.chunks[0].parameters())
    assert not any(layer._forward_hooks for layer in model.chunks[0].decoder.layers)


def test_of_a_large_model_some_layers_of_each_kind_are_compared(monkeypatch):
    monkeypatch.setattr(model_proof, "ALL_LAYERS_BYTES", 1000)
    model = taken(replace(JobArguments(), num_layers=6))
    assert model_proof.layers_to_compare(model) == [0, 2, 5]
    assert {finding.order for finding in prove(model, packing=False)} == {-1, 0, 2, 5, 6, 7}
    monkeypatch.setattr(model_proof, "PART_BYTES", 1000)
    assert prove(model, packing=False) == []
