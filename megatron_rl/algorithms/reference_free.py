"""SimPO, CPO and ORPO: preference optimisation without a reference model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_rl.algorithms.base import ALGORITHMS
from megatron_rl.algorithms.logistic import logistic_loss, smoothed_logistic
from megatron_rl.algorithms.offline import OfflineAlgorithm, PairwiseAlgorithm
from megatron_rl.algorithms.pairs import Pairs
from megatron_rl.config.ranges import FlipProbability, NonNegative, Positive

CERTAIN = -1e-6  # mean log-probabilities are held below this: log-odds of a certain response are infinite


@ALGORITHMS.register("simpo")
class SimPO(PairwiseAlgorithm):
    """Simple Preference Optimization (arXiv 2405.14734, eq. 6): -log sigmoid(beta (mean l_w - mean l_l) - gamma), where
    l are log-probabilities of the policy alone."""

    class Config(OfflineAlgorithm.Config):
        """Settings of SimPO."""

        beta: Positive = 2.0
        """Scale of the length-normalised rewards."""
        gamma: NonNegative = 0.5
        """Target margin between the rewards."""
        label_smoothing: FlipProbability = 0.0
        """Probability that a label is flipped."""
        sft_weight: NonNegative = 0.0
        """Weight of the chosen response's negative log-likelihood per token."""

    name = "simpo"
    config: Config

    def pair_loss(self, pairs: Pairs) -> dict[str, Tensor]:
        chosen, rejected = self.pair_rewards(pairs)
        terms = {"simpo": smoothed_logistic(chosen - rejected - self.config.gamma, self.config.label_smoothing)}
        return terms | likelihood_term(pairs, self.config.sft_weight)

    def pair_rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        chosen, rejected = mean_logprobs(pairs)
        return self.config.beta * chosen, self.config.beta * rejected


@ALGORITHMS.register("cpo")
class CPO(PairwiseAlgorithm):
    """Contrastive Preference Optimization (arXiv 2401.08417, section 3): DPO's loss with a uniform reference, plus the
    chosen response's negative log-likelihood, here per token (the paper sums)."""

    class Config(OfflineAlgorithm.Config):
        """Settings of CPO."""

        beta: Positive = 0.1
        """Scale of the log-probabilities."""
        label_smoothing: FlipProbability = 0.0
        """Probability that a label is flipped."""
        sft_weight: NonNegative = 1.0
        """Weight of the chosen response's negative log-likelihood per token."""

    name = "cpo"
    config: Config

    def pair_loss(self, pairs: Pairs) -> dict[str, Tensor]:
        chosen, rejected = self.pair_rewards(pairs)
        terms = {"cpo": smoothed_logistic(chosen - rejected, self.config.label_smoothing)}
        return terms | likelihood_term(pairs, self.config.sft_weight)

    def pair_rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        return self.config.beta * pairs.chosen, self.config.beta * pairs.rejected


@ALGORITHMS.register("orpo")
class ORPO(PairwiseAlgorithm):
    """Odds Ratio Preference Optimization (arXiv 2403.07691, eqs. 6, 7): NLL(chosen) - beta log sigmoid(log odds ratio).

    Probabilities are geometric means per token, P = exp(mean logp), odds = P / (1 - P). The likelihood term covers the
    response only (TRL's covers the prompt as well).
    """

    class Config(OfflineAlgorithm.Config):
        """Settings of ORPO."""

        beta: Positive = 0.1
        """Weight of the odds-ratio term (lambda in the paper)."""

    name = "orpo"
    config: Config

    def pair_loss(self, pairs: Pairs) -> dict[str, Tensor]:
        chosen, rejected = mean_logprobs(pairs)
        ratio = log_odds(chosen) - log_odds(rejected)
        return {"orpo": self.config.beta * logistic_loss(ratio)} | likelihood_term(pairs, 1.0)

    def pair_rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        chosen, rejected = mean_logprobs(pairs)
        return self.config.beta * chosen, self.config.beta * rejected


def mean_logprobs(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Log-probability per token of both responses; 0 for an empty one."""
    return pairs.chosen / pairs.chosen_tokens.clamp_min(1), pairs.rejected / pairs.rejected_tokens.clamp_min(1)


def likelihood_term(pairs: Pairs, weight: float) -> dict[str, Tensor]:
    """The weighted negative log-likelihood of the chosen response; nothing when the weight is 0."""
    return {"sft": -weight * mean_logprobs(pairs)[0]} if weight else {}


def log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0, accurate at both ends; beyond -1e-6 it is constant."""
    held = logprob.clamp(max=CERTAIN)
    near_one = torch.log(-torch.expm1(held.clamp_min(-1.0)))
    far = torch.log1p(-torch.exp(held.clamp_max(-math.log(2.0))))
    return held - torch.where(held > -math.log(2.0), near_one, far)
