"""`decode_attention`: against attention written out in float64, one head and one token at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from ops.conftest import cases, prepared
from torch import Tensor

from megatron_rl.ops.decode_attention import decode_attention
from megatron_rl.ops.selection import load


@pytest.fixture(params=["reference", *cases("decode_attention")], scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from prepared("decode_attention", request.param)


def case(
    rows: int, kv_heads: int, group: int, head_dim: int, length: int, turned: int | None = None
) -> tuple[Tensor, ...]:
    """qkv, cos, sin, cache (with one row and some positions to spare), positions."""
    torch.manual_seed(rows + head_dim)
    angles = torch.rand(rows, 1, (turned or head_dim) // 2) * 6
    cos = torch.cat([angles.cos(), angles.cos()], -1)
    sin = torch.cat([-angles.sin(), angles.sin()], -1)
    qkv = torch.randn(rows, kv_heads * (group + 2), head_dim) * 2
    cache = torch.randn(rows + 1, kv_heads, 2, length + 3, head_dim)
    positions = torch.randint(0, length, (rows,))
    positions[0] = length - 1
    return qkv, cos, sin, cache, positions


def written_out(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    positions: Tensor,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Context and cache afterwards, in float64."""
    qkv, cos, sin, cache = (tensor.double() for tensor in (qkv, cos, sin, cache))
    cache = cache.clone()
    rows, heads, head_dim = qkv.shape
    kv_heads = cache.shape[1]
    q_heads = heads - 2 * kv_heads
    half = cos.shape[2] // 2
    context = torch.zeros(rows, q_heads, head_dim, dtype=torch.float64)

    def turned(vector: Tensor, row: int) -> Tensor:
        first, second = vector[:half], vector[half : 2 * half]
        c, s = cos[row, 0, :half], sin[row, 0, half:]
        return torch.cat([first * c - second * s, second * c + first * s, vector[2 * half :]])

    for row in range(rows):
        position = int(positions[row])
        for head in range(kv_heads):
            cache[row, head, 0, position] = turned(qkv[row, q_heads + head], row)
            cache[row, head, 1, position] = qkv[row, q_heads + kv_heads + head]
        for head in range(q_heads):
            seen = slice(max(0, position + 1 - (window or position + 1)), position + 1)
            keys, values = cache[row, head // (q_heads // kv_heads), :, seen]
            scores = keys @ turned(qkv[row, head], row) * (scale or 1 / math.sqrt(head_dim))
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            scores = scores if sinks is None else torch.cat([scores, sinks[head : head + 1].double()])
            context[row, head] = torch.softmax(scores, 0)[: len(values)] @ values
    return context.flatten(1), cache


SHAPES = [
    (5, 2, 2, 8, 13),
    (1, 1, 1, 2, 1),
    (3, 1, 7, 12, 40),
    (9, 4, 1, 32, 8),
    (2, 2, 4, 64, 700),
    (6, 3, 2, 6, 17),
    (5, 2, 2, 16, 21, 6),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_context_and_cache_are_those_of_attention_written_out(shape: tuple[int, ...], implementation: str) -> None:
    qkv, cos, sin, cache, positions = case(*shape)
    expected, expected_cache = written_out(qkv, cos, sin, cache, positions)
    length = int(positions.max()) + 1
    context = decode_attention(qkv, cos, sin, cache, positions, length, implementation=implementation)
    torch.testing.assert_close(context.double(), expected, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(cache.double(), expected_cache, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 2, 2, 8, 13), (2, 2, 4, 64, 700), (6, 3, 2, 6, 17)])
@pytest.mark.parametrize(
    "rule",
    [{"window": 5}, {"softcap": 1.5}, {"sinks": True}, {"scale": 0.7, "window": 16, "softcap": 3.0, "sinks": True}],
    ids=str,
)
def test_windows_soft_caps_and_sinks(shape: tuple[int, ...], rule: dict, implementation: str) -> None:
    qkv, cos, sin, cache, positions = case(*shape)
    rule = rule | ({"sinks": torch.randn(shape[1] * shape[2])} if "sinks" in rule else {})
    expected, _ = written_out(qkv, cos, sin, cache, positions, **rule)
    length = int(positions.max()) + 1
    context = decode_attention(qkv, cos, sin, cache, positions, length, implementation=implementation, **rule)
    torch.testing.assert_close(context.double(), expected, atol=3e-6, rtol=1e-5)


def test_what_lies_behind_a_sequence_is_not_seen(implementation: str) -> None:
    qkv, cos, sin, cache, positions = case(5, 2, 2, 8, 13)
    positions[:] = torch.tensor([12, 0, 3, 7, 8])
    other = cache.clone()
    for row, position in enumerate(positions.tolist()):
        other[row, :, :, position:] = 1e4
    contexts = [
        decode_attention(qkv.clone(), cos, sin, memory, positions, 13, implementation=implementation)
        for memory in (cache, other)
    ]
    assert torch.equal(*contexts)


def test_extreme_scores_neither_overflow_nor_vanish(implementation: str) -> None:
    qkv, cos, sin, cache, positions = case(4, 2, 2, 8, 13)
    qkv *= 100
    expected, _ = written_out(qkv, cos, sin, cache, positions)
    context = decode_attention(qkv, cos, sin, cache, positions, 13, implementation=implementation)
    torch.testing.assert_close(context.double(), expected, atol=2e-2, rtol=1e-3)


def test_nan_in_a_sequence_stays_in_it_and_shows(implementation: str) -> None:
    qkv, cos, sin, cache, positions = case(4, 2, 2, 8, 13)
    healthy = decode_attention(qkv.clone(), cos, sin, cache.clone(), positions, 13, implementation=implementation)
    qkv[2] = math.nan
    context = decode_attention(qkv, cos, sin, cache, positions, 13, implementation=implementation)
    assert context[2].isnan().all()
    assert torch.equal(context[[0, 1, 3]], healthy[[0, 1, 3]])


def test_a_row_does_not_depend_on_the_others_nor_on_threads() -> None:
    load("decode_attention", "cpu", "cpu")
    qkv, cos, sin, cache, positions = case(33, 2, 2, 16, 50)
    together = decode_attention(qkv.clone(), cos, sin, cache.clone(), positions, 50, implementation="cpu")
    torch.set_num_threads(2)
    threaded = decode_attention(qkv.clone(), cos, sin, cache.clone(), positions, 50, implementation="cpu")
    alone = [
        decode_attention(*(t[row : row + 1].clone() for t in (qkv, cos, sin, cache, positions)), 50)  # type: ignore[arg-type]
        for row in range(33)
    ]
    assert torch.equal(together, threaded)
    assert torch.equal(together, torch.cat(alone))


def test_bfloat16_runs_on_the_reference() -> None:
    qkv, cos, sin, cache, positions = case(5, 2, 2, 8, 13)
    expected, _ = written_out(qkv, cos, sin, cache, positions)
    small = (tensor.bfloat16() for tensor in (qkv, cos, sin, cache))
    context = decode_attention(*small, positions, 13)  # type: ignore[arg-type]
    assert (context.double() - expected).abs().max() < 0.1


def test_tensors_that_do_not_fit_are_refused() -> None:
    qkv, cos, sin, cache, positions = case(5, 2, 2, 8, 13)
    with pytest.raises(ValueError, match="does not fit the cache"):
        decode_attention(qkv, cos, sin, cache[:4], positions, 13)
    with pytest.raises(ValueError, match="length 17"):
        decode_attention(qkv, cos, sin, cache, positions, 17)
    with pytest.raises(ValueError, match="one dtype"):
        decode_attention(qkv.double(), cos, sin, cache, positions, 13)
    with pytest.raises(ValueError, match="head_dim"):
        decode_attention(qkv, cos[:, :, :3], sin[:, :, :3], cache, positions, 13)
    with pytest.raises(ValueError, match="more than the 8 channels"):
        decode_attention(qkv, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2), cache, positions, 13)
