"""`swiglu` and `rms_norm`: values and gradients against torch in float64, every implementation and vector level."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from ops.conftest import cases, prepared
from torch import Tensor

from megatron_rl.ops.rms_norm import rms_norm
from megatron_rl.ops.swiglu import swiglu


@pytest.fixture(params=["reference", *cases("swiglu")], scope="module")
def swiglu_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from prepared("swiglu", request.param)


@pytest.fixture(params=["reference", *cases("rms_norm")], scope="module")
def norm_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from prepared("rms_norm", request.param)


def with_gradients(run: Callable[..., Tensor], dtype: torch.dtype, grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def assert_as_exact_as_torch(run: Callable, torch_run: Callable, grad: Tensor, *inputs: Tensor) -> None:
    """Errors against float64 are at most twice those of torch in float32."""
    found, exact, same = (
        with_gradients(function, dtype, grad, *inputs)
        for function, dtype in ((run, torch.float32), (torch_run, torch.float64), (torch_run, torch.float32))
    )
    for index, (mine, true, plain) in enumerate(zip(found, exact, same, strict=True)):
        error, allowed = (mine - true).abs().max(), 2 * (plain - true).abs().max() + 1e-7 * true.abs().max()
        assert error <= allowed, f"output and gradients, number {index}: {error:.2e} > {allowed:.2e}"


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("width", [1, 16, 43, 172])
def test_swiglu_and_its_gradient(swiglu_implementation, width: int) -> None:
    torch.manual_seed(width)
    x, grad = torch.randn(37, 2, 2 * width) * 4, torch.randn(37, 2, width)
    assert_as_exact_as_torch(lambda x: swiglu(x, implementation=swiglu_implementation), plain_swiglu, grad, x)


def test_swiglu_of_huge_gates_has_no_overflow(swiglu_implementation) -> None:
    gates = torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4, float("nan")])
    out, grad = with_gradients(
        lambda x: swiglu(x, implementation=swiglu_implementation),
        torch.float32,
        torch.ones(1, 7),
        torch.cat([gates, torch.ones(7)])[None],
    )
    torch.testing.assert_close(out[0, :6], F.silu(gates[:6]), atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(grad[0, :6], torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]), atol=1e-30, rtol=1e-6)
    assert out[0, 6].isnan()
    assert grad[0, 6].isnan()


@pytest.mark.parametrize("cols", [8, 20, 64, 200])
def test_rms_norm_and_its_gradients(norm_implementation, cols: int) -> None:
    torch.manual_seed(cols)
    x, weight, grad = torch.randn(300, 2, cols) * 3, torch.rand(cols) + 0.5, torch.randn(300, 2, cols)
    x[7] *= 1e-3  # where eps counts
    assert_as_exact_as_torch(
        lambda x, weight: rms_norm(x, weight, 1e-5, implementation=norm_implementation),
        lambda x, weight: F.rms_norm(x, (cols,), weight, 1e-5),
        grad,
        x,
        weight,
    )


def test_gradients_of_the_norm_do_not_depend_on_threads() -> None:
    x, weight, grad = torch.randn(1000, 64), torch.rand(64), torch.randn(1000, 64)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(with_gradients(lambda x, w: rms_norm(x, w, 1e-5), torch.float32, grad, x, weight))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_slices_are_taken_as_they_are(swiglu_implementation, norm_implementation) -> None:
    wide = torch.randn(5, 64)
    part = wide[:, 8:40]
    assert torch.equal(
        swiglu(part, implementation=swiglu_implementation),
        swiglu(part.contiguous(), implementation=swiglu_implementation),
    )
    weight = torch.rand(32)
    assert torch.equal(
        rms_norm(part, weight, 1e-5, implementation=norm_implementation),
        rms_norm(part.contiguous(), weight, 1e-5, implementation=norm_implementation),
    )


def test_other_dtypes_take_the_reference() -> None:
    x = torch.randn(4, 32).bfloat16()
    assert swiglu(x).dtype == torch.bfloat16
    assert rms_norm(x, torch.ones(32).bfloat16(), 1e-5).dtype == torch.bfloat16


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="gates"):
        swiglu(torch.randn(2, 7))
    with pytest.raises(ValueError, match="last dimension"):
        rms_norm(torch.randn(2, 7), torch.ones(8), 1e-5)
