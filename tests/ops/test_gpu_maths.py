"""Operations with rounding on a real GPU: against float64, and as good as plain torch in the same precision there."""

from __future__ import annotations

import pytest
import torch
from ops.gpu_device import DEVICE, only_on_a_gpu
from ops.test_decode_attention import case as decode_case
from ops.test_gae import ragged
from ops.test_packed_attention import CHUNKS, WHOLE, gradients, tensors, written_out
from ops.test_token_logprobs import Outcome, Problem, assert_as_good_as, ours, plain, problem

from megatron_rl.ops.add_rms_norm import add_rms_norm
from megatron_rl.ops.decode_attention import decode_attention
from megatron_rl.ops.gae import gae
from megatron_rl.ops.packed_attention import packed_attention
from megatron_rl.ops.rms_norm import rms_norm
from megatron_rl.ops.selection import load
from megatron_rl.ops.swiglu import swiglu

pytestmark = only_on_a_gpu
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(p: Problem) -> Problem:
    return Problem(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in p))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"tokens": 700, "width": 64, "vocab": 5000, "rows": 5056}], ids=str
)
def test_token_logprobs_and_gradients_on_a_gpu(implementation, dtype, options):
    given = on_gpu(problem(dtype=dtype, **options))
    found = Outcome(*(x.cpu() for x in ours(given, implementation=implementation)))
    same_precision, exact = plain(given, dtype), plain(given, torch.float64)
    assert_as_good_as(found, *(Outcome(*(x.cpu() for x in outcome)) for outcome in (same_precision, exact)))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gae_on_a_gpu(implementation, dtype):
    lengths = [1, 0, 700, 256, 3, 257, 64]
    rewards, values, mask = ragged(7, lengths, 0.7)
    inputs = (torch.tensor(rewards, dtype=dtype), torch.tensor(values, dtype=dtype), torch.tensor(mask))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    exact = gae(inputs[0].double(), inputs[1].double(), inputs[2], bounds, 0.99, 0.95, implementation="reference")
    found = gae(*(x.to(DEVICE) for x in inputs), bounds.to(DEVICE), 0.99, 0.95, implementation=implementation)
    tolerance = 4e-6 if dtype == torch.float32 else 1e-12
    for mine, truth in zip(found, exact, strict=True):
        assert mine.device.type == DEVICE.type
        torch.testing.assert_close(mine.cpu().double(), truth, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_norms_and_swiglu_on_a_gpu(dtype):
    torch.manual_seed(3)
    x, delta, weight = torch.randn(33, 256).to(dtype), torch.randn(33, 256).to(dtype), torch.randn(256).to(dtype)
    bound = 8 * torch.finfo(dtype).eps

    def normed(h):
        return h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    found = rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5)
    torch.testing.assert_close(found.cpu().double(), normed(x.double()), rtol=bound, atol=bound)
    hidden = x.clone().to(DEVICE)
    found = add_rms_norm(hidden, delta.to(DEVICE), weight.to(DEVICE), 1e-5)
    total = hidden.cpu().double()
    torch.testing.assert_close(total, x.double() + delta.double(), rtol=bound, atol=bound)
    torch.testing.assert_close(found.cpu().double(), normed(total), rtol=bound, atol=bound)
    gate, up = x.double().chunk(2, -1)
    exact = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(swiglu(x.to(DEVICE)).cpu().double(), exact, rtol=bound, atol=bound)


@pytest.mark.parametrize("segments", [WHOLE, CHUNKS], ids=["whole", "chunks"])
def test_packed_attention_and_gradients_on_a_gpu(segments):
    """The choice of `ops.selection` on a GPU; its error against float64 at most twice that of plain torch in fp32."""
    parts, scale, table = tensors(segments, 4, 2, 16, 16), 0.25, torch.tensor(segments)
    exact = gradients(lambda *x: written_out(*x, segments, scale), parts, torch.float64)
    plain_torch = gradients(lambda *x: written_out(*x, segments, scale), parts, torch.float32)
    found = gradients(
        lambda *x: packed_attention(*(y.to(DEVICE) for y in x), table, scale=scale).cpu(), parts, torch.float32
    )
    for name, mine, true, same in zip(("out", "query", "key", "value"), found, exact, plain_torch, strict=True):
        error, allowed = (mine - true).abs().max(), 2 * (same - true).abs().max() + 2e-6
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


def test_decode_attention_on_a_gpu():
    qkv, cos, sin, cache, positions = decode_case(rows=5, kv_heads=2, group=2, head_dim=16, length=9)
    expected_cache, found_cache = cache.double(), cache.clone().to(DEVICE)
    reference = load("decode_attention", "reference", "cpu")
    expected = reference(qkv.double(), cos.double(), sin.double(), expected_cache, positions, 9, 16**-0.5)
    found = decode_attention(
        qkv.clone().to(DEVICE), cos.to(DEVICE), sin.to(DEVICE), found_cache, positions.to(DEVICE), 9
    )
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_cache.cpu().double(), expected_cache, rtol=1e-6, atol=1e-6)
