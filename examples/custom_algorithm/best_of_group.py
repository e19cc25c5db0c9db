"""A custom algorithm in one file: maximum likelihood of each response, weighted by its reward within the group.

Advantage-weighted regression within a prompt's group: the weight of a response is
exp((reward - group mean) / temperature), at most ``largest``. Data flow, parallelism, logging and checkpoints come from
the base.
"""

import torch

from megatron_rl import BaseAlgorithm
from megatron_rl.algorithms.advantages import group_statistics, spread_over_tokens
from megatron_rl.workers.loss import LossInputs, LossOutput


class BestOfGroup(BaseAlgorithm):
    """Maximum likelihood of each response, weighted by its reward within the group."""

    class Config(BaseAlgorithm.Config):
        """Keys of `algorithm` in the YAML, beside those of every algorithm."""

        temperature: float = 0.5
        """Reward difference that changes a weight e-fold."""
        largest: float = 5.0
        """Upper bound of a weight."""

    name = "best-of-group"

    def prepare(self, batch) -> None:
        """Once a step, on the host: the weight of each token."""
        group = group_statistics(batch["rewards"], batch["groups"])
        weights = ((batch["rewards"].double() - group.mean) / self.config.temperature).exp()
        weights = torch.where(group.uniform, 0.0, weights.clamp_max(self.config.largest))  # all equal: nothing to learn
        batch.tokens["advantages"] = spread_over_tokens(batch, weights.float())

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Of a micro-batch: pure, and divided by the tokens of the whole mini-batch over all ranks."""
        per_token = -inputs.logprobs * inputs.fields["advantages"]
        loss = (per_token * inputs.mask).sum() / inputs.totals.tokens
        return LossOutput(loss, {"loss/best_of_group": inputs.token_metric(per_token)})
