"""Core attention against an explicit softmax in float64; layouts over ranks are in test_model_layouts.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_rl
from megatron_rl.engines.megatron.model.builder import transformer_config
from megatron_rl.engines.megatron.model.core_attention import CoreAttention, packed_params, zigzag_order
from megatron_rl.engines.megatron.model.rope import CosSinTable
from megatron_rl.models import Architecture
from megatron_rl.models.components.position import Rotary
from megatron_rl.parallel import ParallelSizes
from megatron_rl.parallel.context import ParallelContext

from megatron.core.transformer.enums import AttnMaskType  # isort: skip  (after megatron_rl: the CPU face)

assert megatron_rl

ARCHITECTURE = Architecture("llama", 1, 32, 64, 4, 2, 8, 64, tied=False)


@pytest.fixture(scope="module")
def context() -> ParallelContext:
    return ParallelContext.create(ParallelSizes(), seed=1)


def core_attention(context: ParallelContext, **options) -> CoreAttention:
    config = transformer_config(ARCHITECTURE, ParallelSizes(), **options)
    return CoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=context.collection)


def qkv(tokens: int, rows: int, heads=4, groups=2, width=8, value_width=8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((heads, width), (groups, width), (groups, value_width))
    return tuple(torch.randn(tokens, rows, *shape, generator=generator).requires_grad_() for shape in shapes)


def explicit(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """[s, b, heads * d_value] with an explicit [s, s] mask, float64."""
    repeat = query.shape[2] // key.shape[2]
    q, k, v = query.double(), key.double().repeat_interleave(repeat, 2), value.double().repeat_interleave(repeat, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, v).flatten(2)


def assert_same(got: Tensor, want: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Values and gradients of a random projection agree."""
    factor = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad((got.double() * factor).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((want * factor).sum(), inputs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "groups", "width", "value_width"), [(4, 4, 8, 8), (4, 2, 8, 8), (6, 1, 8, 4)])
def test_padded_rows_attend_causally(context, heads, groups, width, value_width):
    inputs = qkv(12, 3, heads, groups, width, value_width)
    got = core_attention(context)(*inputs, None)
    assert got.shape == (12, 3, heads * value_width)
    assert_same(got, explicit(*inputs, torch.ones(12, 12).tril().bool(), 8**-0.5), inputs)


@pytest.mark.parametrize("lengths", [(12,), (3, 5, 4), (1, 1, 10)])
def test_packed_sequences_do_not_see_one_another(context, lengths):
    inputs = qkv(12, 1)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = torch.ones(12, 12).tril().bool() & (owner[:, None] == owner[None, :])
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    got = core_attention(context)(*(x.squeeze(1) for x in inputs), None, packed_seq_params=packed_params(cu_seqlens))
    assert got.shape == (12, 1, 32)
    assert_same(got, explicit(*inputs, visible, 8**-0.5), inputs)


def test_longrope_turns_each_sequence_by_its_own_length(context):
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 4, "factor": 8.0}
    scaling |= {"short_factor": (1.0, 2.0), "long_factor": (3.0, 5.0)}
    table = CosSinTable(Rotary(4, 100.0, tuple(sorted(scaling.items()))))
    attention, inputs = core_attention(context), qkv(12, 1)
    attention.rotary = table
    packed = packed_params(torch.tensor([0, 3, 8, 12], dtype=torch.int32))  # only the second is longer than 4
    together = attention(*(x.squeeze(1) for x in inputs), None, packed_seq_params=packed)
    assert table.is_long(5)
    assert not table.is_long(4)
    alone = [attention(*(x[start:stop] for x in inputs), None) for start, stop in ((0, 3), (3, 8), (8, 12))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    attention.rotary = CosSinTable(replace(table.rotary, scaling=()))
    assert not torch.allclose(attention(*(x[3:8] for x in inputs), None), alone[1], atol=1e-3)


@pytest.mark.parametrize(("lengths", "window"), [((12,), 4), ((3, 5, 4), 3), ((1, 1, 10), 1)])
def test_windows_hide_what_lies_before_them(context, lengths, window):
    inputs = qkv(12, 1)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    visible = torch.ones(12, 12).tril().triu(1 - window).bool() & (owner[:, None] == owner[None, :])
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).int()
    attention = core_attention(context, window_size=(window - 1, 0))
    got = attention(*(x.squeeze(1) for x in inputs), None, packed_seq_params=packed_params(cu_seqlens))
    assert_same(got, explicit(*inputs, visible, 8**-0.5), inputs)
    with pytest.raises(ValueError, match="a sliding window, a soft cap or sinks: pass None"):
        attention(*inputs, torch.zeros(12, 12, dtype=torch.bool)[None, None])


def test_an_explicit_mask_is_taken_as_it_is(context):
    inputs = qkv(6, 2)
    masked = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    masked.fill_diagonal_(False)
    got = core_attention(context)(*inputs, masked[None, None])
    assert_same(got, explicit(*inputs, ~masked, 8**-0.5), inputs)


def test_packed_cost_is_not_quadratic_in_the_packed_length(context):
    """No tensor is larger than the inputs' projections, although the pack is long."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for item in out if isinstance(out, tuple | list) else (out,):
                if isinstance(item, Tensor):
                    self.elements = max(self.elements, item.numel())
            return out

    inputs = qkv(2048, 1)
    cu_seqlens = torch.arange(0, 2049, 16, dtype=torch.int32)
    with Largest() as largest:
        out = core_attention(context)(
            *(x.squeeze(1) for x in inputs), None, packed_seq_params=packed_params(cu_seqlens)
        )
        out.sum().backward()
    assert largest.elements == inputs[0].numel() == 2048 * 32


def test_packed_lengths_that_do_not_cover_the_positions_are_refused(context):
    inputs = (x.squeeze(1) for x in qkv(12, 1))
    params = packed_params(torch.tensor([0, 5, 9], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"cu_seqlens cover 9 positions, but 12 positions \* cp=1 were given"):
        core_attention(context)(*inputs, None, packed_seq_params=params)


def test_packed_params_hold_the_exact_longest_length():
    params = packed_params(torch.tensor([0, 5, 9, 20], dtype=torch.int32))
    assert (params.max_seqlen_q, params.max_seqlen_kv, params.qkv_format) == (11, 11, "thd")


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_zigzag_order_restores_natural_order(cp_size):
    lengths = (2 * cp_size * 3, 2 * cp_size)
    whole = torch.arange(sum(lengths))
    parts = []
    for rank in range(cp_size):
        for sequence in whole.split(list(lengths)):
            chunks = sequence.chunk(2 * cp_size)
            parts += [chunks[rank], chunks[2 * cp_size - 1 - rank]]
    order = zigzag_order(tuple(length // cp_size for length in lengths), cp_size, torch.device("cpu"))
    assert torch.equal(torch.cat(parts)[order], whole)


def test_attention_that_is_not_plain_and_causal_is_refused(context):
    config = transformer_config(ARCHITECTURE, ParallelSizes())
    with pytest.raises(ValueError, match=r"attn_mask_type=AttnMaskType\.no_mask is not supported"):
        CoreAttention(config, 1, AttnMaskType.no_mask, "self", pg_collection=context.collection)
    with pytest.raises(ValueError, match=r"window_size=\(4, 4\) is not supported"):
        core_attention(context, window_size=(4, 4))


def test_dropout_only_acts_in_training(context):
    attention = core_attention(context, attention_dropout=0.5)
    inputs = qkv(6, 2)
    whole = explicit(*inputs, torch.ones(6, 6).tril().bool(), 8**-0.5)
    torch.testing.assert_close(attention.eval()(*inputs, None).double(), whole, rtol=1e-5, atol=1e-6)
    assert (attention.train()(*inputs, None).double() - whole).abs().max() > 0.1


def test_a_mask_made_under_inference_mode_serves_a_later_backward():
    with torch.inference_mode():
        zigzag_order((8, 4), 2, torch.device("cpu"))
    order = zigzag_order((8, 4), 2, torch.device("cpu"))
    torch.randn(24, 2, requires_grad=True).index_select(0, order).sum().backward()
