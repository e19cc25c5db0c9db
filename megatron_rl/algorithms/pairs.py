"""`Pairs`, the input of every preference loss, and the losses in a registry.

Notation: l_w, l_l are the log-ratios log(policy / reference) of the whole chosen and rejected response, m = l_w - l_l.
Each loss is minimised, ``[num_pairs]``, and named as in TRL's ``DPOConfig.loss_type``. Labels are smoothed in
every loss that takes ``label_smoothing``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from megatron_rl.algorithms.logistic import logistic_loss, smoothed_logistic
from megatron_rl.algorithms.pair_fields import matched
from megatron_rl.config import ConfigRecord
from megatron_rl.config.ranges import FlipProbability, Positive
from megatron_rl.registry import Registry

FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]  # in the place of DPO's reverse KL
MAX_EXPONENT = 80.0  # exp of it is finite in fp32; beyond, the slope is 0


@dataclass(frozen=True, slots=True)
class Pairs:
    """Whole-response sums of one micro-batch's pairs, each ``[num_pairs]``."""

    chosen: Tensor  # log-probability of the chosen response, with gradient
    rejected: Tensor
    ref_chosen: Tensor  # the same under the reference; 0 without one
    ref_rejected: Tensor
    chosen_tokens: Tensor  # response tokens, as floating point
    rejected_tokens: Tensor
    shift: float = 0.0  # running mean of the rewards; bco_pair
    divergence: FDivergence = "reverse_kl"
    alpha: float = 0.5  # of the alpha divergence
    matched_reference: Tensor | None = None  # aot: reference margin matched to each policy margin; None: match here
    matched_rejected: Tensor | None = None  # aot_unpaired: l_l matched to each l_w, over all pairs of the step
    matched_chosen: Tensor | None = None  # aot_unpaired: l_w matched to each l_l

    @classmethod
    def of_sequences(cls, logprobs: Tensor, reference: Tensor, num_tokens: Tensor) -> Pairs:
        """From ``[num_sequences]`` sums in the order chosen, rejected, chosen, ..."""
        return cls(
            chosen=logprobs[0::2],
            rejected=logprobs[1::2],
            ref_chosen=reference[0::2],
            ref_rejected=reference[1::2],
            chosen_tokens=num_tokens[0::2].to(logprobs.dtype),
            rejected_tokens=num_tokens[1::2].to(logprobs.dtype),
        )

    @property
    def present(self) -> Tensor:
        """Pairs with any response token, bool."""
        return self.chosen_tokens + self.rejected_tokens > 0

    @property
    def chosen_ratio(self) -> Tensor:
        """l_w"""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """l_l"""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """m = l_w - l_l; with another divergence the difference of its slopes at both."""
        chosen, rejected = self._slopes()
        return chosen - rejected

    @property
    def mean_margin(self) -> Tensor:
        """m with each log-ratio divided by its response's tokens."""
        chosen, rejected = self._slopes()
        return chosen / self.chosen_tokens.clamp_min(1) - rejected / self.rejected_tokens.clamp_min(1)

    def _slopes(self) -> tuple[Tensor, Tensor]:
        ratios = (self.chosen_ratio, self.rejected_ratio)
        chosen, rejected = (f_slope(ratio, self.divergence, self.alpha) for ratio in ratios)
        return chosen, rejected


def f_slope(log_ratio: Tensor, divergence: FDivergence, alpha: float) -> Tensor:
    """f'(u) of u = policy / reference, 0 at u = 1: what beta is multiplied with in f-DPO (arXiv 2309.16240, table 1).

    reverse_kl: log u. forward_kl: 1 - 1 / u. js: log(2 u / (1 + u)). alpha: (1 - u^-alpha) / alpha, between the first
    (alpha towards 0) and the second (towards 1); TRL's coefficient is 1 - alpha.
    """
    if divergence == "reverse_kl":
        return log_ratio
    if divergence == "js":
        return math.log(2.0) + functional.logsigmoid(log_ratio)
    power = alpha if divergence == "alpha" else 1.0
    return -torch.expm1((-power * log_ratio).clamp(max=MAX_EXPONENT)) / power


class PairConfig(ConfigRecord):
    """Parameters of the losses below."""

    beta: Positive = 0.1
    """Strength of the tie to the reference."""
    label_smoothing: FlipProbability = 0.0
    """Probability that a label is flipped; for sigmoid, robust, exo_pair, sigmoid_norm, aot and aot_unpaired."""
    ipo_length_norm: bool = False
    """Divide log-ratios by the response's tokens in ipo: the paper's formula does not, TRL always does."""
    discopop_tau: Positive = 0.05
    """Temperature of discopop's mixing."""


PairLoss = Callable[[Pairs, PairConfig], Tensor]
PAIR_LOSSES: Registry[PairLoss] = Registry("preference loss")
SMOOTHED = ("sigmoid", "robust", "exo_pair", "sigmoid_norm", "aot", "aot_unpaired")  # losses that take label_smoothing
OF_MARGINS = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop")  # functions of m alone


@PAIR_LOSSES.register("sigmoid")
def sigmoid(pairs: Pairs, config: PairConfig) -> Tensor:
    """-log sigmoid(beta m): DPO (arXiv 2305.18290, eq. 7), smoothed as conservative DPO (E. Mitchell, 2023)."""
    return smoothed_logistic(config.beta * pairs.margin, config.label_smoothing)


@PAIR_LOSSES.register("sigmoid_norm")
def sigmoid_norm(pairs: Pairs, config: PairConfig) -> Tensor:
    """The same on log-ratios per token: length-normalised DPO (Tulu 3, arXiv 2411.15124, section 5)."""
    return smoothed_logistic(config.beta * pairs.mean_margin, config.label_smoothing)


@PAIR_LOSSES.register("hinge")
def hinge(pairs: Pairs, config: PairConfig) -> Tensor:
    """max(0, 1 - beta m): SLiC on log-ratios (arXiv 2305.10425; as in RSO, arXiv 2309.06657)."""
    return (1.0 - config.beta * pairs.margin).relu()


@PAIR_LOSSES.register("ipo")
def ipo(pairs: Pairs, config: PairConfig) -> Tensor:
    """(m - 1 / (2 beta))^2: IPO (arXiv 2310.12036, eq. 17)."""
    margin = pairs.mean_margin if config.ipo_length_norm else pairs.margin
    return (margin - 1.0 / (2.0 * config.beta)).square()


@PAIR_LOSSES.register("robust")
def robust(pairs: Pairs, config: PairConfig) -> Tensor:
    """Unbiased under flips with probability s: [(1 - s) L(m) - s L(-m)] / (1 - 2 s), L = -log sigmoid(beta .); robust
    DPO (arXiv 2403.00409, section 3). May be negative."""
    x, flips = config.beta * pairs.margin, config.label_smoothing
    return ((1 - flips) * logistic_loss(x) - flips * logistic_loss(-x)) / (1 - 2 * flips)


@PAIR_LOSSES.register("exo_pair")
def exo_pair(pairs: Pairs, config: PairConfig) -> Tensor:
    """KL(q || p), q = softmax of beta times both log-ratios, p = (1 - s, s): EXO (arXiv 2402.00856, eq. 16); s must be
    above 0, and 0 log 0 = 0."""
    x, flips = config.beta * pairs.margin, config.label_smoothing
    wins = torch.sigmoid(x) * (functional.logsigmoid(x) - math.log1p(-flips))
    return wins + torch.sigmoid(-x) * (functional.logsigmoid(-x) - math.log(flips))


@PAIR_LOSSES.register("nca_pair")
def nca_pair(pairs: Pairs, config: PairConfig) -> Tensor:
    """-log sigmoid(beta l_w) - [log sigmoid(-beta l_w) + log sigmoid(-beta l_l)] / 2: NCA (arXiv 2402.05369)
    for K = 2 with preferences."""
    chosen, rejected = config.beta * pairs.chosen_ratio, config.beta * pairs.rejected_ratio
    return logistic_loss(chosen) + 0.5 * logistic_loss(-chosen) + 0.5 * logistic_loss(-rejected)


@PAIR_LOSSES.register("bco_pair")
def bco_pair(pairs: Pairs, config: PairConfig) -> Tensor:
    """-log sigmoid(beta l_w - d) - log sigmoid(-(beta l_l - d)), d = running mean reward: BCO on pairs (arXiv
    2404.04656, section 3)."""
    chosen = config.beta * pairs.chosen_ratio - pairs.shift
    rejected = config.beta * pairs.rejected_ratio - pairs.shift
    return logistic_loss(chosen) + logistic_loss(-rejected)


@PAIR_LOSSES.register("sppo_hard")
def sppo_hard(pairs: Pairs, config: PairConfig) -> Tensor:
    """(l_w - 1 / (2 beta))^2 + (l_l + 1 / (2 beta))^2: SPPO (arXiv 2405.00675, eq. 4.7) with hard probabilities."""
    half = 0.5 / config.beta
    return (pairs.chosen_ratio - half).square() + (pairs.rejected_ratio + half).square()


@PAIR_LOSSES.register("apo_zero")
def apo_zero(pairs: Pairs, config: PairConfig) -> Tensor:
    """1 - sigmoid(beta l_w) + sigmoid(beta l_l): APO-zero (arXiv 2408.06266, eq. 7); raises chosen, lowers rejected."""
    return torch.sigmoid(-config.beta * pairs.chosen_ratio) + torch.sigmoid(config.beta * pairs.rejected_ratio)


@PAIR_LOSSES.register("apo_down")
def apo_down(pairs: Pairs, config: PairConfig) -> Tensor:
    """sigmoid(beta l_w) + 1 - sigmoid(beta m): APO-down (arXiv 2408.06266, eq. 8); lowers both, rejected more."""
    return torch.sigmoid(config.beta * pairs.chosen_ratio) + torch.sigmoid(-config.beta * pairs.margin)


@PAIR_LOSSES.register("discopop")
def discopop(pairs: Pairs, config: PairConfig) -> Tensor:
    """(1 - g) * -log sigmoid(x) + g * exp(-x), x = beta m, g = sigmoid(x / tau): DiscoPOP (arXiv 2406.08414, eq. 5)."""
    x = config.beta * pairs.margin
    # g * exp(-x) as one exponential: for very negative x the product is 0 times infinity in floating point
    gated = torch.exp(functional.logsigmoid(x / config.discopop_tau) - x)
    return torch.sigmoid(-x / config.discopop_tau) * logistic_loss(x) + gated


@PAIR_LOSSES.register("aot")
def aot(pairs: Pairs, config: PairConfig) -> Tensor:
    """-log sigmoid(beta (u_(k) - v_(k))), u_(k) the k-th smallest policy margin of all pairs, v_(k) that of the
    reference: AOT on pairs (arXiv 2406.05882, algorithm 1), smoothed as sigmoid is."""
    policy = pairs.chosen - pairs.rejected
    reference = pairs.matched_reference
    if reference is None:
        reference = matched(policy.detach(), pairs.ref_chosen - pairs.ref_rejected, pairs.present)
    return smoothed_logistic(config.beta * (policy - reference), config.label_smoothing)


@PAIR_LOSSES.register("aot_unpaired")
def aot_unpaired(pairs: Pairs, config: PairConfig) -> Tensor:
    """-log sigmoid(beta (a_(k) - b_(k))), a_(k) the k-th smallest l_w of all pairs, b_(k) the k-th smallest l_l: AOT on
    unpaired responses (arXiv 2406.05882, algorithm 2).

    A pair's l_w and l_l are each in one such term, with a partner from any pair of the step that has no gradient. The
    pair therefore gets half the value of both terms and their full gradient with respect to its own l_w and l_l.
    """
    chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
    below, above = pairs.matched_rejected, pairs.matched_chosen
    if below is None or above is None:
        below = matched(chosen.detach(), rejected.detach(), pairs.present)
        above = matched(rejected.detach(), chosen.detach(), pairs.present)
    terms = smoothed_logistic(config.beta * (chosen - below), config.label_smoothing)
    terms = terms + smoothed_logistic(config.beta * (above - rejected), config.label_smoothing)
    return terms - 0.5 * terms.detach()


@PAIR_LOSSES.register("sft")
def sft(pairs: Pairs, config: PairConfig) -> Tensor:
    """Negative log-likelihood of the chosen response per token (the term of RPO, arXiv 2404.19733, eq. 1). TRL averages
    over all chosen tokens of a batch instead, which gives long responses more weight."""
    return -pairs.chosen / pairs.chosen_tokens.clamp_min(1)
