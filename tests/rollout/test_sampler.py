"""Drawing tokens: right distribution, right supports, randomness by counter alone."""

from __future__ import annotations

import pytest
import torch
from rollout.rollout_models import local_engine, random_model
from scipy import stats

from megatron_rl.rollout import SamplingParams, sample_seed
from megatron_rl.rollout.local.sampler import draw, uniforms

DRAWS = 40_000


def draws(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.from_numpy(uniforms([11], DRAWS))[0]
    return draw(logits.expand(DRAWS, -1), numbers, params)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 2
    tokens, logprobs = draws(logits, SamplingParams(temperature=temperature))
    expected = torch.softmax(logits.double() / temperature, -1)
    counts = torch.bincount(tokens, minlength=20)
    assert stats.chisquare(counts.numpy(), (expected / expected.sum() * DRAWS).numpy()).pvalue > 1e-3
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("params", "support"),
    [
        (SamplingParams(top_k=2), {1, 3}),
        (SamplingParams(top_k=1), {3}),
        (SamplingParams(top_p=0.4), {3}),
        (SamplingParams(top_p=0.5), {1, 3}),
        (SamplingParams(top_p=0.85), {0, 1, 3}),
        (SamplingParams(top_k=3, top_p=0.5), {1, 3}),
        (SamplingParams(top_k=2, top_p=0.99), {1, 3}),
        (SamplingParams(top_k=99), {0, 1, 2, 3, 4}),
    ],
)
def test_truncation_keeps_the_likeliest_tokens_in_their_proportions(params: SamplingParams, support: set[int]) -> None:
    probs = torch.tensor([0.15, 0.30, 0.07, 0.45, 0.03])
    tokens, logprobs = draws(probs.log(), params)
    counts = torch.bincount(tokens, minlength=5)
    assert {i for i in range(5) if counts[i]} == support
    if len(support) > 1:
        kept = torch.tensor([probs[i].item() if i in support else 0.0 for i in range(5)]).double()
        inside = sorted(support)
        expected = (kept / kept.sum() * DRAWS)[inside]
        assert stats.chisquare(counts[inside].numpy(), expected.numpy()).pvalue > 1e-3
    torch.testing.assert_close(logprobs, probs.log()[tokens], atol=1e-5, rtol=0)


def test_greedy_logprobs_are_those_of_temperature_one() -> None:
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(2)) * 3
    tokens, logprobs = draw(logits, torch.zeros(7, dtype=torch.float64), SamplingParams(temperature=0))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1).max(-1).values)


def test_impossible_tokens_are_never_drawn_at_either_end() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    ends = torch.tensor([0.0, 1 - 2.0**-52, 0.5, 0.49999], dtype=torch.float64)
    tokens, _ = draw(logits.expand(4, -1), ends, SamplingParams())
    assert tokens.tolist() == [1, 3, 3, 1]


def test_uniforms_are_uniform_and_independent_of_one_another() -> None:
    numbers = uniforms([sample_seed(0, prompt, sample) for prompt in range(50) for sample in range(8)], 100)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.ravel(), "uniform").pvalue > 1e-3
    for lagged in (numbers[:, 1:] - numbers[:, :-1], numbers[1:] - numbers[:-1], numbers[8:] - numbers[:-8]):
        triangular = stats.triang(0.5, loc=-1, scale=2)
        assert stats.kstest(lagged[::2, ::2].ravel(), triangular.cdf).pvalue > 1e-3


def test_uniforms_of_a_seed_are_a_prefix_stable_function_of_it() -> None:
    together = uniforms([3, 2**64 - 1, 5], 10)
    assert (uniforms([2**64 - 1], 4)[0] == together[1, :4]).all()


def test_sample_seeds_are_distinct_and_documented_by_value() -> None:
    seeds = {sample_seed(s, p, j) for s in range(4) for p in range(60) for j in range(20)}
    assert len(seeds) == 4 * 60 * 20
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert sample_seed(0, -1, 0) != sample_seed(0, 1, 0)


def test_first_tokens_of_an_engine_follow_the_models_softmax() -> None:
    model = random_model("llama")
    prompt = [5, 9, 11]
    with local_engine(model, max_running=500) as engine:
        (group,) = engine.generate([prompt], SamplingParams(n=4000, max_tokens=1, temperature=1.3))
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / 1.3, -1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in group]), minlength=100).double()
    rare = expected * 4000 < 5
    pooled_counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    pooled = torch.cat([expected[~rare], expected[rare].sum()[None]])
    assert stats.chisquare(pooled_counts.numpy(), (pooled * 4000).numpy()).pvalue > 1e-3
