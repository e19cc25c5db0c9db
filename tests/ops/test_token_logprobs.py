"""`token_logprobs` against log_softmax in float64, for every implementation that runs here."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_rl.ops.selection import UnavailableError, implementations, load
from megatron_rl.ops.token_logprobs import from_logits, token_logprobs
from megatron_rl.ops.token_logprobs.tiles import Tiling


def available() -> list[str]:
    names = []
    for name in implementations("token_logprobs"):
        try:
            load("token_logprobs", name, "cpu")
        except UnavailableError:
            continue
        names.append(name)
    return names


class Problem(NamedTuple):
    """Random inputs; ``rows`` beyond ``vocab`` are padding and hold large values that must not be seen."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    vocab: int
    grad_logprobs: Tensor
    grad_entropy: Tensor
    temperature: float = 1.0
    softcap: float | None = None


def problem(tokens=37, width=16, vocab=50, rows=64, temperature=1.0, dtype=torch.float32, seed=0, scale=1.0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(rows, width, generator=generator) * scale
    weight[vocab:] = 100.0
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    grads = torch.randn(2, tokens, generator=generator)
    return Problem(hidden.to(dtype), weight.to(dtype), targets, vocab, grads[0], grads[1], temperature)


class Outcome(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


def plain(p: Problem, dtype: torch.dtype) -> Outcome:
    """The textbook form, computed in ``dtype`` from the same inputs."""
    hidden, weight = (x.to(dtype).detach().requires_grad_() for x in (p.hidden, p.weight))
    logits = hidden @ weight[: p.vocab].t()
    logits = logits if p.softcap is None else torch.tanh(logits / p.softcap) * p.softcap
    logits = (logits if dtype == torch.float64 else logits.float()) / p.temperature
    logs = torch.log_softmax(logits, dim=-1)
    logprobs = logs.gather(1, p.targets[:, None]).squeeze(1)
    entropy = -(logs.exp() * logs).sum(dim=-1)
    (logprobs @ p.grad_logprobs.to(logprobs) + entropy @ p.grad_entropy.to(entropy)).backward()
    return Outcome(logprobs.detach(), entropy.detach(), hidden.grad, weight.grad)


def ours(p: Problem, **options) -> Outcome:
    hidden, weight = (x.detach().clone().requires_grad_() for x in (p.hidden, p.weight))
    logprobs, entropy = token_logprobs(
        hidden,
        weight,
        p.targets,
        vocab_size=p.vocab,
        temperature=p.temperature,
        softcap=p.softcap,
        with_entropy=True,
        **options,
    )
    (logprobs @ p.grad_logprobs + entropy @ p.grad_entropy).backward()
    return Outcome(logprobs.detach(), entropy.detach(), hidden.grad, weight.grad)


def assert_as_good_as(got: Outcome, plain_outcome: Outcome, exact: Outcome) -> None:
    """Root-mean-square error against float64 at most twice that of plain torch in the same precision."""
    for name, mine, theirs, truth in zip(Outcome._fields, got, plain_outcome, exact, strict=True):
        floor = torch.finfo(torch.float32).eps * truth.abs().max()  # where plain torch happens to be exact
        error, allowed = ((x.double() - truth).pow(2).mean().sqrt() for x in (mine, theirs))
        assert error <= 2 * allowed + floor, f"{name}: error {error:.2e}, plain torch {allowed:.2e}"


@pytest.fixture(params=available())
def implementation(request) -> str:
    return request.param


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("chunk_tokens", [None, 8, 1])
def test_values_and_gradients_match_log_softmax(implementation, temperature, chunk_tokens):
    p = problem(temperature=temperature)
    got = ours(p, chunk_tokens=chunk_tokens, implementation=implementation)
    assert_as_good_as(got, plain(p, torch.float32), plain(p, torch.float64))


@pytest.mark.parametrize("chunk_tokens", [None, 8])
@pytest.mark.parametrize("softcap", [30.0, 2.5])
def test_soft_caps_bend_values_and_gradients(implementation, softcap, chunk_tokens):
    p = problem(temperature=0.7)._replace(softcap=softcap)
    got = ours(p, chunk_tokens=chunk_tokens, implementation=implementation)
    assert_as_good_as(got, plain(p, torch.float32), plain(p, torch.float64))
    half = problem(dtype=torch.bfloat16)._replace(softcap=softcap)
    assert_as_good_as(
        ours(half, implementation=implementation), plain(half, torch.bfloat16), plain(half, torch.float64)
    )


@pytest.mark.parametrize(("tokens", "vocab", "rows"), [(1, 1, 1), (5, 64, 64), (130, 257, 384), (64, 1000, 1024)])
def test_all_shapes(implementation, tokens, vocab, rows):
    p = problem(tokens=tokens, vocab=vocab, rows=rows, width=24)
    assert_as_good_as(ours(p, implementation=implementation), plain(p, torch.float32), plain(p, torch.float64))


def test_confident_and_near_tied_tokens_keep_their_precision(implementation):
    for scale in (10.0, 1e-3):
        p = problem(scale=scale)
        assert_as_good_as(ours(p, implementation=implementation), plain(p, torch.float32), plain(p, torch.float64))


def test_logits_of_ten_thousands_are_as_exact_as_plain_torch(implementation):
    """Most tokens have a probability of 0 here, whose share in the entropy is 0 log 0."""
    p = problem(scale=1e4)
    got, exact = ours(p, implementation=implementation), plain(p, torch.float64)
    assert exact.logprobs.min() < -1e4
    assert_as_good_as(got, plain(p, torch.float32), exact)


def test_a_logit_of_minus_infinity_has_no_share_in_the_entropy_nor_in_any_gradient(implementation):
    """0 log 0 = 0: the same as without these rows. fp32 products overflow to -inf here, as fp16 ones do at 65,504."""
    p = problem(temperature=0.7)
    p.hidden[:, 0] = 10.0
    rows = [0, 7, 8, 9, 49]
    p.weight[rows, 0] = -1e38
    p = p._replace(targets=torch.where(torch.isin(p.targets, torch.tensor(rows)), 1, p.targets))
    assert torch.isneginf(p.hidden @ p.weight.t()).any()
    got = ours(p, implementation=implementation)
    kept = [row for row in range(p.vocab) if row not in rows]
    places = torch.full((p.vocab,), -1)
    places[kept] = torch.arange(len(kept))
    small = p._replace(weight=p.weight[kept], targets=places[p.targets], vocab=len(kept))
    exact = plain(small, torch.float64)
    assert (got.grad_weight[rows] == 0).all()
    got = got._replace(grad_weight=got.grad_weight[kept])
    assert_as_good_as(got, plain(small, torch.float32), exact)


def test_a_target_at_minus_infinity_has_that_logprob_and_spoils_no_other(implementation):
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [2.0, 0.0, -torch.inf]], requires_grad=True)
    logprobs, entropy = from_logits(logits, torch.tensor([1, 0]), with_entropy=True, implementation=implementation)
    assert logprobs[0] == -torch.inf
    (logprobs[1] + entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 1] == logits.grad[1, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [0, 14])
def test_from_logits_is_log_softmax_of_them(implementation, dtype, padding):
    generator = torch.Generator().manual_seed(3)
    given = (torch.randn(23, 50 + padding, generator=generator) * 3).to(dtype)
    given[:, 50:] = 30.0
    given[3, 7:30] = -torch.inf
    targets, factors = torch.randint(0, 7, (23,), generator=generator), torch.randn(2, 23, generator=generator)

    def textbook(precision: torch.dtype) -> list[Tensor]:
        logits = given.detach().clone().to(precision).requires_grad_()
        logs = torch.log_softmax(logits[:, :50] / 0.7, dim=-1)
        held = torch.where(logs.isneginf(), 0.0, logs)
        found = [logs.gather(1, targets[:, None]).squeeze(1), -(logs.exp() * held).sum(-1)]
        (found[0] @ factors[0].to(precision) + found[1] @ factors[1].to(precision)).backward()
        return [*(value.detach() for value in found), logits.grad]

    logits = given.clone().requires_grad_()
    logprobs, entropy = from_logits(
        logits, targets, vocab_size=50, temperature=0.7, with_entropy=True, implementation=implementation
    )
    (logprobs @ factors[0] + entropy @ factors[1]).backward()
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logits.grad.dtype == dtype
    got = [logprobs.detach(), entropy.detach(), logits.grad]
    for mine, theirs, truth in zip(got, textbook(torch.float32), textbook(torch.float64), strict=True):
        allowed = (theirs.double() - truth).abs().max() * 2 + torch.finfo(mine.dtype).eps * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= allowed
    assert torch.equal(logits.grad[:, 50:], torch.zeros(23, padding, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_plain_torch(implementation, dtype):
    p = problem(tokens=64, width=32, vocab=200, rows=256, dtype=dtype, scale=0.3)
    got = ours(p, chunk_tokens=16, implementation=implementation)
    assert got.logprobs.dtype == got.entropy.dtype == torch.float32
    assert got.grad_hidden.dtype == got.grad_weight.dtype == dtype
    assert_as_good_as(got, plain(p, dtype), plain(p, torch.float64))


def test_padding_rows_get_no_gradient_and_no_probability(implementation):
    p = problem()
    got = ours(p, implementation=implementation)
    assert (got.grad_weight[p.vocab :] == 0).all()
    assert (got.logprobs > -50).all()  # a visible padding row (logits of several hundred) would push them far below


def test_entropy_is_only_returned_when_asked_for(implementation):
    p = problem()
    logprobs, entropy = token_logprobs(p.hidden, p.weight, p.targets, vocab_size=p.vocab, implementation=implementation)
    assert entropy is None
    assert torch.equal(logprobs, ours(p, implementation=implementation).logprobs)


def test_gradients_of_logprobs_alone_and_of_entropy_alone_add_up(implementation):
    p = problem()
    whole = ours(p, implementation=implementation)
    zero = torch.zeros_like(p.grad_logprobs)
    parts = [
        ours(p._replace(grad_entropy=zero), implementation=implementation),
        ours(p._replace(grad_logprobs=zero), implementation=implementation),
    ]
    torch.testing.assert_close(parts[0].grad_hidden + parts[1].grad_hidden, whole.grad_hidden)
    torch.testing.assert_close(parts[0].grad_weight + parts[1].grad_weight, whole.grad_weight)


def test_tokens_without_gradient_are_skipped_exactly(implementation):
    p = problem()
    keep = torch.arange(37) % 3 == 0
    masked = p._replace(grad_logprobs=p.grad_logprobs * keep, grad_entropy=p.grad_entropy * keep)
    alone = p._replace(
        hidden=p.hidden[keep],
        targets=p.targets[keep],
        grad_logprobs=p.grad_logprobs[keep],
        grad_entropy=p.grad_entropy[keep],
    )
    got, few = ours(masked, implementation=implementation), ours(alone, implementation=implementation)
    assert (got.grad_hidden[~keep] == 0).all()
    torch.testing.assert_close(got.grad_hidden[keep], few.grad_hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.grad_weight, few.grad_weight, rtol=1e-5, atol=1e-6)


TILED = {"cpu": "CpuKernels", "triton": "TritonKernels"}


@pytest.mark.parametrize("kept_tiles", [0, 1, 3, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", [name for name in available() if name in TILED])
def test_tiles_and_what_is_kept_of_them_change_nothing(name, masked, kept_tiles, monkeypatch):
    module = importlib.import_module(f"megatron_rl.ops.token_logprobs.{name}")
    for height in (16, 37):  # several tiles of tokens, and one
        tile = 64 * height  # 64 rows is the least a tile takes: 300 rows make five
        tiling = Tiling(4 * tile, height, keep_bytes=4 * tile * kept_tiles, keep_half_bytes=2 * tile * kept_tiles)
        monkeypatch.setattr(vars(module)[TILED[name]], "tiling", tiling)
        p = problem(vocab=300, rows=320, temperature=0.7)
        if masked:
            keep = torch.arange(37) % 3 == 0
            p = p._replace(grad_logprobs=p.grad_logprobs * keep, grad_entropy=p.grad_entropy * keep)
        assert_as_good_as(ours(p, implementation=name), plain(p, torch.float32), plain(p, torch.float64))


@pytest.mark.skipif("cpu" not in available(), reason="no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_vector_levels_and_threads_change_no_bit(dtype):
    limit = torch.ops.megatron_rl_cpu.limit_vector_level
    p = problem(vocab=1100, rows=1152, temperature=0.7, dtype=dtype)  # two whole blocks of columns and a ragged one
    first = ours(p, implementation="cpu")
    try:
        for level in (0, 1, 2):
            limit(level)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                again = ours(p, implementation="cpu")
                for name, value, expected in zip(Outcome._fields, again, first, strict=True):
                    if not (name.startswith("grad") and threads > 1):  # these are products, whose sums threads split
                        assert torch.equal(value, expected), (name, level, threads)
    finally:
        limit(2)
    assert_as_good_as(first, plain(p, dtype), plain(p, torch.float64))


def test_a_backward_pass_may_come_twice(implementation):
    p = problem()
    hidden = p.hidden.clone().requires_grad_()
    logprobs, _ = token_logprobs(hidden, p.weight, p.targets, vocab_size=p.vocab, implementation=implementation)
    first, second = (torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_tokens_and_frozen_inputs(implementation):
    p = problem()
    hidden = p.hidden[:0].clone().requires_grad_()
    logprobs, _ = token_logprobs(hidden, p.weight, p.targets[:0], vocab_size=p.vocab, implementation=implementation)
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    frozen = p.hidden.clone().requires_grad_()
    logprobs, _ = token_logprobs(frozen, p.weight, p.targets, vocab_size=p.vocab, implementation=implementation)
    logprobs.sum().backward()
    assert frozen.grad is not None


def test_a_tied_weight_collects_both_gradients(implementation):
    p = problem()
    weight = p.weight.clone().requires_grad_()
    hidden = torch.nn.functional.embedding(p.targets.roll(1), weight)
    logprobs, _ = token_logprobs(hidden, weight, p.targets, vocab_size=p.vocab, implementation=implementation)
    logprobs.sum().backward()
    again = p.weight.double().requires_grad_()
    logits = torch.nn.functional.embedding(p.targets.roll(1), again) @ again[: p.vocab].t()
    torch.log_softmax(logits, -1).gather(1, p.targets[:, None]).sum().backward()
    torch.testing.assert_close(weight.grad.double(), again.grad, rtol=1e-4, atol=1e-4)


def test_bad_calls_say_what_is_wrong():
    p = problem()
    with pytest.raises(ValueError, match=r"temperature=0.0: expected a positive number"):
        token_logprobs(p.hidden, p.weight, p.targets, temperature=0.0)
    with pytest.raises(ValueError, match=r"expected \[tokens, hidden\] and \[rows, hidden\]"):
        token_logprobs(p.hidden, p.weight[:, :3], p.targets)
    with pytest.raises(ValueError, match=r"expected \[37\] torch.int64"):
        token_logprobs(p.hidden, p.weight, p.targets[:5])
    with pytest.raises(ValueError, match=r"logits \[50\] torch.float32: expected \[tokens, rows\]"):
        from_logits(torch.zeros(50), p.targets)
    with pytest.raises(ValueError, match=r"expected \[3\] torch.int64"):
        from_logits(torch.zeros(3, 50), p.targets)
    with pytest.raises(ValueError, match="expected one of"):
        token_logprobs(p.hidden, p.weight.bfloat16(), p.targets)
