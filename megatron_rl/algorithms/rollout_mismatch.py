"""The mismatch between the rollout engine's policy and the trainer's, measured in every step, and its likely cause.

Both give the sampled tokens a probability. These differ because the sampling weights were older (staleness), were not
the trainer's at all (weights), because prompt or mask are not what the engine saw (tokenisation), or because two
implementations round differently (numerics). Each cause shows in other metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rl.algorithms.kl import k3
from megatron_rl.batch import Batch
from megatron_rl.rollout.base import WeightCheck
from megatron_rl.workers.loss import LossInputs, Mean

NUMERICS_KL = 0.02  # nats a token; bf16 against bf16 is one to two orders of magnitude below
FIRST_TOKEN_FACTOR = 10.0  # a first token with a KL this much higher than the others followed another prompt


def staleness(batch: Batch, trained_version: int) -> Tensor:
    """Versions between the weights that sampled each token and ``trained_version``, ``[num_tokens]`` fp32; 0 on
    prompts."""
    rows = []
    for sample in batch.samples:
        spans = sample.policy_version_spans or [(sample.policy_version, len(sample.response_ids))]
        versions = [version for version, count in spans for _ in range(count)]
        rows += [0.0] * len(sample.prompt.token_ids) + [float(trained_version - version) for version in versions]
    return torch.tensor(rows, dtype=torch.float32)


def response_starts(batch: Batch) -> Tensor:
    """Whether a token is the first of a response, or of its part after an observation, ``[num_tokens]`` bool. Computed
    on whole sequences: context-parallel ranks do not see the neighbours of all their tokens."""
    mask, owner = batch["response_mask"].bool(), batch.sequence_ids
    goes_on = torch.zeros_like(mask)
    goes_on[1:] = mask[:-1] & (owner[1:] == owner[:-1])
    return mask & ~goes_on


def mismatch_metrics(inputs: LossInputs, log_ratio: Tensor) -> dict[str, Mean]:
    """Metrics of one micro-batch.

    Args:
        log_ratio: trainer minus rollout log-probabilities, 0 outside the response mask, ``[num_tokens]``. k3 of it
            estimates KL(rollout || trainer) on samples of the rollout policy (Schulman, "Approximating KL divergence").
    """
    log_ratio, mask = log_ratio.detach(), inputs.mask
    kl = k3(log_ratio)
    stale = (inputs.fields["staleness"] > 0).float() * mask
    first = inputs.masked(inputs.fields["response_starts"].float()) * (mask - stale)
    one = torch.ones_like(mask.sum())
    return {
        "mismatch/kl": inputs.token_metric(kl),
        "mismatch/logprob_difference_max": Mean(log_ratio.abs().max() if log_ratio.numel() else 0.0 * one, one),
        "mismatch/log_perplexity_ratio": inputs.token_metric(-log_ratio),
        "mismatch/stale_fraction": inputs.token_metric(stale),
        "mismatch/kl_stale": Mean((kl * stale).sum(), stale.sum()),
        "mismatch/kl_fresh": Mean((kl * (mask - stale)).sum(), (mask - stale).sum()),
        "mismatch/kl_fresh_first_token": Mean((kl * first).sum(), first.sum()),
    }


def perplexity_ratio(metrics: Mapping[str, float]) -> float:
    """Perplexity of the samples under the trainer divided by that under the engine."""
    return math.exp(min(metrics["mismatch/log_perplexity_ratio"], 20.0))


def explain(metrics: Mapping[str, float], check: WeightCheck) -> str:
    """The likely cause of a mismatch, and what to look at.

    Args:
        metrics: of a step; ``mismatch/kl_...`` are missing where there are no such tokens.
        check: whether the engines hold the weights that were pushed: a fact, where the metrics are only a hint.
    """
    if check.faults:
        return f"wrong or mixed weights: {'; '.join(check.faults)}"
    kl, fresh, first, stale = (
        metrics.get(f"mismatch/kl{part}", 0.0) for part in ("", "_fresh", "_fresh_first_token", "_stale")
    )
    stale_share = metrics["mismatch/stale_fraction"] * stale / max(kl, 1e-30)
    figures = f"{fresh:.4f} on tokens of the newest weights, {first:.4f} on the first ones of responses"
    if stale_share > 0.5:
        part = metrics["mismatch/stale_fraction"]
        return (
            f"perhaps staleness: {part:.0%} of the tokens, of older weights, make {stale_share:.0%} of it ({figures})"
        )
    if first > FIRST_TOKEN_FACTOR * max(fresh, NUMERICS_KL / FIRST_TOKEN_FACTOR):
        return f"perhaps tokenisation or masking: first tokens were sampled after another context ({figures})"
    if fresh > NUMERICS_KL and check.compared:
        return (
            f"not the servers' weights (by their checksums {check.compared} hold what was pushed), but too much for "
            f"rounding ({figures}): see that trainer and servers agree on temperature, precision and model config"
        )
    if fresh > NUMERICS_KL:
        return (
            f"perhaps wrong or mixed weights: too much for rounding ({figures}); see that pushes are attested by "
            f"checksums"
        )
    return f"perhaps numerics: small and equal everywhere ({figures})"
