"""`packed_attention`: against attention written out in float64, one head and one query at a time, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from ops.conftest import cases, prepared
from torch import Tensor

from megatron_rl.ops.packed_attention import packed_attention
from megatron_rl.ops.selection import load

WHOLE = [(0, 5, 0, 5), (5, 1, 5, 1), (6, 37, 6, 37)]  # three sequences end to end
CHUNKS = [(0, 4, 0, 8), (4, 4, 0, 32), (8, 9, 32, 18), (17, 9, 32, 36)]  # of two sequences, keys shared


@pytest.fixture(params=["reference", *cases("packed_attention")], scope="module")
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from prepared("packed_attention", request.param)


def tensors(segments: list[tuple[int, ...]], heads: int, groups: int, dim: int, value_dim: int) -> list[Tensor]:
    """query, key, value (slices of one tensor, as a projection gives them), and the gradient of the output."""
    torch.manual_seed(len(segments) + dim)
    queries, keys = sum(s[1] for s in segments), max(s[2] + s[3] for s in segments)
    both = torch.randn(keys, groups, dim + value_dim)
    return [
        torch.randn(queries, heads, dim) * 2,
        both[..., :dim],
        both[..., dim:],
        torch.randn(queries, heads, value_dim),
    ]


def written_out(query: Tensor, key: Tensor, value: Tensor, segments: list[tuple[int, ...]], scale: float) -> Tensor:
    rows = []
    per_group = query.shape[1] // key.shape[1]
    for first_query, num_queries, first_key, num_keys in segments:
        for i in range(num_queries):
            seen = slice(first_key, first_key + num_keys - num_queries + i + 1)
            heads = [
                torch.softmax(scale * key[seen, h // per_group] @ query[first_query + i, h], 0)
                @ value[seen, h // per_group]
                for h in range(query.shape[1])
            ]
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def ruled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    segments: list[tuple[int, ...]],
    scale: float,
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
) -> Tensor:
    """As `written_out`, with windows, soft caps and sinks."""
    rows = []
    for first_query, num_queries, first_key, num_keys in segments:
        for i in range(num_queries):
            end = first_key + num_keys - num_queries + i + 1
            start = max(first_key, end - (window or num_keys))
            heads = []
            for h in range(query.shape[1]):
                group = h // (query.shape[1] // key.shape[1])
                scores = scale * key[start:end, group] @ query[first_query + i, h]
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                weights = torch.softmax(torch.cat([scores, sinks[h : h + 1]] if with_sinks else [scores]), 0)
                heads.append(weights[: end - start] @ value[start:end, group])
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def gradients(run, parts: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and the gradients of all parts but the last, which is the gradient of the output."""
    leaves = [part.detach().to(dtype).requires_grad_() for part in parts[:-1]]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, parts[-1].to(dtype), materialize_grads=True)]


@pytest.mark.parametrize("segments", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("shape", [(8, 4, 8, 8), (4, 4, 20, 12), (6, 2, 64, 64)], ids=str)
def test_output_and_gradients_equal_attention_in_double_precision(implementation, segments, shape) -> None:
    parts, scale = tensors(segments, *shape), shape[2] ** -0.5
    table = torch.tensor(segments)
    found = gradients(
        lambda *x: packed_attention(*x, table, scale=scale, implementation=implementation), parts, torch.float32
    )
    exact = gradients(lambda *x: written_out(*x, segments, scale), parts, torch.float64)
    plain = gradients(lambda *x: written_out(*x, segments, scale), parts, torch.float32)
    for name, mine, true, same in zip(("out", "query", "key", "value"), found, exact, plain, strict=True):
        error, allowed = (mine - true).abs().max(), 2 * (same - true).abs().max() + 2e-6
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


RULES = [(3, None, False), (18, None, False), (None, 2.5, False), (None, None, True), (17, 1.5, True)]


@pytest.mark.parametrize("segments", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize(("window", "softcap", "with_sinks"), RULES)
def test_windows_soft_caps_and_sinks_with_their_gradients(implementation, segments, window, softcap, with_sinks):
    query, key, value, grad = tensors(segments, 6, 3, 20, 12)
    parts, table = [query, key, value, torch.randn(6) * 2, grad], torch.tensor(segments)

    def run(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        given = {"window": window, "softcap": softcap, "sinks": sinks if with_sinks else None}
        return packed_attention(query, key, value, table, scale=0.4, implementation=implementation, **given)

    def exactly(*x: Tensor) -> Tensor:
        return ruled(*x, segments, 0.4, window, softcap, with_sinks)

    found, exact = gradients(run, parts, torch.float32), gradients(exactly, parts, torch.float64)
    plain = gradients(exactly, parts, torch.float32)
    assert (found[4] != 0).any() == with_sinks
    for name, mine, true, same in zip(("out", "query", "key", "value", "sinks"), found, exact, plain, strict=True):
        error, allowed = (mine - true).abs().max(), 2 * (same - true).abs().max() + 4e-6
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def test_rules_that_make_no_sense_are_refused() -> None:
    parts, table = tensors(WHOLE, 8, 4, 8, 8)[:3], torch.tensor(WHOLE)
    with pytest.raises(ValueError, match=r"softcap=0\.0"):
        packed_attention(*parts, table, scale=0.3, softcap=0.0)
    with pytest.raises(ValueError, match=r"one for each of the 8 heads"):
        packed_attention(*parts, table, scale=0.3, sinks=torch.zeros(4))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """``x`` ``[positions, heads, dim]`` as complex numbers, times exp(i * angle)."""
    half = angles.shape[-1]
    out = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([out.real, out.imag, x[..., 2 * half :]], dim=-1)


@pytest.mark.parametrize("half", [6, 4])  # all or the first channels of a head
@pytest.mark.parametrize("segments", [WHOLE, CHUNKS], ids=["whole", "chunks"])
def test_rotary_positions_are_those_of_a_segments_keys(implementation, segments, half) -> None:
    parts, table = tensors(segments, 4, 2, 12, 12), torch.tensor(segments)
    angles = torch.rand(50, half, dtype=torch.float64) * 6
    rotary = torch.stack([angles.cos(), angles.sin()]).float()

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(query, key, value, table, scale=0.3, rotary=rotary, implementation=implementation)

    def exactly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        queries, keys = torch.zeros(len(query), dtype=torch.int64), torch.zeros(len(key), dtype=torch.int64)
        for first_query, num_queries, first_key, num_keys in segments:
            keys[first_key : first_key + num_keys] = torch.arange(num_keys)
            queries[first_query : first_query + num_queries] = torch.arange(num_keys - num_queries, num_keys)
        return written_out(turned(query, angles[queries]), turned(key, angles[keys]), value, segments, 0.3)

    found, exact = gradients(run, parts, torch.float32), gradients(exactly, parts, torch.float64)
    for name, mine, true in zip(("out", "query", "key", "value"), found, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5, msg=name)


def test_slices_of_a_larger_tensor_give_the_same_bits(implementation) -> None:
    query, key, value, _ = tensors(WHOLE, 8, 4, 8, 8)
    table = torch.tensor(WHOLE)

    def run(*parts: Tensor) -> Tensor:
        return packed_attention(*parts, table, scale=0.3, implementation=implementation)

    assert torch.equal(run(query, key, value), run(query.clone(), key.contiguous(), value.contiguous()))


def test_a_sequence_does_not_depend_on_its_neighbours(implementation) -> None:
    parts = tensors(WHOLE, 8, 4, 8, 8)
    run = load("packed_attention", implementation, "cpu")
    together = run(*parts[:3], torch.tensor(WHOLE), None, 0.3, 0.0)
    alone = run(*(part[6:43] for part in parts[:3]), torch.tensor([(0, 37, 0, 37)]), None, 0.3, 0.0)
    assert torch.equal(together[6:43], alone)


@pytest.mark.parametrize("implementation", cases("packed_attention"), indirect=True)  # a reference's sums are torch's
def test_threads_change_no_bit(implementation) -> None:
    parts = tensors(CHUNKS, 8, 4, 8, 8)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(
            gradients(
                lambda *x: packed_attention(*x, torch.tensor(CHUNKS), scale=0.3, implementation=implementation),
                parts,
                torch.float32,
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_nan_reaches_every_query_that_sees_it_and_no_other(implementation) -> None:
    query, key, value, _ = tensors(WHOLE, 8, 4, 8, 8)
    key = key.clone()
    key[20, 1, 3] = float("nan")  # position 14 of the third sequence, seen by heads 2 and 3
    out = packed_attention(query, key, value, torch.tensor(WHOLE), scale=0.3, implementation=implementation)
    expected = torch.zeros(43, 8, 1, dtype=torch.bool)
    expected[20:, 2:4] = True
    assert torch.equal(out.isnan(), expected.expand_as(out))


def test_other_dtypes_and_dropout_take_the_reference() -> None:
    parts = [part.bfloat16() for part in tensors(WHOLE, 8, 4, 8, 8)[:3]]
    assert packed_attention(*parts, torch.tensor(WHOLE), scale=0.3).dtype == torch.bfloat16
    wide = [part.float() for part in parts]
    torch.manual_seed(0)
    dropped = packed_attention(*wide, torch.tensor(WHOLE), scale=0.3, dropout=0.5)
    assert not torch.equal(dropped, packed_attention(*wide, torch.tensor(WHOLE), scale=0.3))


def test_a_rotary_table_that_is_too_short_is_refused() -> None:
    parts = tensors(WHOLE, 8, 4, 8, 8)[:3]
    with pytest.raises(ValueError, match="37 or more"):
        packed_attention(*parts, torch.tensor(WHOLE), scale=0.3, rotary=torch.ones(2, 36, 4))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([(0, 5, 0, 5)], "do not cover"),
        ([(0, 5, 0, 5), (6, 37, 6, 37)], "do not cover"),
        ([(0, 5, 0, 4), (5, 38, 5, 38)], "do not fit"),
        ([(0, 5, 0, 5), (5, 38, 6, 38)], "do not fit"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segments, message) -> None:
    parts = tensors(WHOLE, 8, 4, 8, 8)[:3]
    with pytest.raises(ValueError, match=message):
        packed_attention(*parts, torch.tensor(segments), scale=0.3)
