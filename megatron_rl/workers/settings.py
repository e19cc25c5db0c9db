"""Settings of the workers: how a model is built, cut into micro-batches, sampled from and synchronised."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field

from megatron_rl.collectives import CollectivesConfig
from megatron_rl.config import ConfigRecord
from megatron_rl.config.bounds import Seed
from megatron_rl.models.lora import LoraSettings
from megatron_rl.rollout.base import SamplingParams
from megatron_rl.workers.optimizer import OptimizerSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DtypeName = Literal["float32", "bfloat16", "float16"]


class RolloutSettings(ConfigRecord):
    """The engine that generates samples."""

    engine: str = "local"
    """Name of a registered rollout engine."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks of one rollout replica."""
    dtype: DtypeName | None = None
    """Of the rollout weights; None = the training dtype."""
    max_running: int = Field(default=256, ge=1)
    """Sequences that one replica decodes at once."""
    max_staging_bytes: int = Field(default=64 * 2**20, ge=1)
    """Most memory that a weight sync may hold beside both copies of the weights, in bytes a rank."""
    attest: bool = True
    """Compare checksums of the trainer's and the engine's weights before a new version is served."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens that stay in the text that every reward reads; others are left out, and put back for a regex that
    names them. EOS and padding are never shown."""
    sleep_while_training: bool = False
    """Give the engine's weights and cache back after each sampling and take them again for the next: memory against
    the time to take it. For engines that share their devices with training."""
    options: dict[str, object] = Field(default_factory=dict)
    """Further keyword arguments of the engine."""


class WorkerSettings(ConfigRecord):
    """An Actor, Critic or trainable RewardModel."""

    dtype: DtypeName = "float32"
    """Of the weights and of the forward pass."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    value_head: bool = False
    """An Actor's value head beside its output layer, for a critic on shared weights (`PPO.Config.shared_critic`)."""
    lora: LoraSettings | None = None
    """Train low-rank adapters on frozen weights; None = train all weights. What is published and saved is merged."""
    compare_with_export: bool = True
    """Compare a Megatron job's own chunks, when they are taken over, with the Hugging Face model that they are exported
    as: one forward pass of a short sequence, layer by layer. Of large models only some layers."""
    token_budget: int = Field(default=4096, ge=1)
    """Tokens of one micro-batch, over all context-parallel ranks."""
    packing: bool | None = None
    """Pack sequences end to end; False = padded rows; None = pack where the model's attention can."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences of one padded micro-batch; None = as many as `token_budget` holds."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """Optimizer and schedule, for models that do not bring their own."""
    collectives: CollectivesConfig = CollectivesConfig()
    """How gradients are reduced over data-parallel ranks."""
    seed: Seed = 0
    """Of sampling and mini-batch order."""
    sampling: SamplingParams = SamplingParams()
    """Defaults of `actor.sample`."""
    rollout: RolloutSettings = RolloutSettings()
    """The rollout engine."""

    def over(self, num_optimizer_steps: int) -> Self:
        """The same, its learning rate decaying over so many optimizer steps where it names no number itself."""
        steps = self.optimizer.decay_steps or num_optimizer_steps
        return self.model_copy(update={"optimizer": self.optimizer.model_copy(update={"decay_steps": steps})})
