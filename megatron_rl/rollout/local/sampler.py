"""Drawing the next token of every running sequence at once, and the randomness behind it.

Randomness is a pure function of (seed, position): uniforms come from SplitMix64 counters and tokens from the inverse
of the cumulative distribution, so what a sequence draws does not depend on its neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_rl.rollout.base import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: Sequence[int], count: int) -> np.ndarray:
    """Numbers in [0, 1), ``[len(seeds), count]`` float64: the i-th outputs of SplitMix64 (Steele et al. 2014, "Fast
    splittable pseudorandom number generators") started at each seed."""
    counters = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    state = np.array(seeds, dtype=np.uint64)[:, None] + counters
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    # 52 bits, not 53: then u * total stays below total after rounding, and no draw falls off the end.
    return (state >> np.uint64(12)) * 2.0**-52


def draw(logits: torch.Tensor, uniform: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row and its log-probability.

    Top-k and top-p both cut the full distribution, as SGLang does (`top_k_top_p_min_p_sampling_from_probs_torch`);
    transformers would renormalise between the two.

    Args:
        logits: ``[rows, vocab]`` fp32, real tokens only.
        uniform: ``[rows]`` float64 in [0, 1).

    Returns:
        tokens ``[rows]`` int64, and fp32 log-probabilities under the softmax of ``logits / temperature`` over the
        whole vocabulary (of ``logits`` when greedy).
    """
    if params.temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        return tokens[:, 0], torch.log_softmax(logits, -1).gather(-1, tokens)[:, 0]
    probs = torch.softmax(logits if params.temperature == 1 else logits / params.temperature, -1)
    candidates, order = _truncate(probs, params)
    # float64: in fp32 the running sum swallows the tail of a large vocabulary.
    cumulative = candidates.cumsum(-1, dtype=torch.float64)
    # right=True passes over tokens of probability 0.
    index = torch.searchsorted(cumulative, cumulative[:, -1:] * uniform[:, None], right=True)
    index.clamp_(max=candidates.shape[-1] - 1)
    tokens = index if order is None else order.gather(-1, index)
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


def _truncate(probs: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities of the candidates, and their token ids (None = all tokens in order)."""
    top_k = min(params.top_k or probs.shape[-1], probs.shape[-1])
    if top_k == probs.shape[-1] and params.top_p == 1:
        return probs, None
    if top_k < probs.shape[-1]:
        kept, order = probs.topk(top_k, dim=-1)
    else:
        kept, order = probs.sort(dim=-1, descending=True, stable=True)
    if params.top_p < 1:
        before = kept.cumsum(-1, dtype=torch.float64) - kept
        kept = kept.masked_fill(before >= params.top_p, 0.0)
    return kept, order
