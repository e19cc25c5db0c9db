"""`ActorConfig`: the config of an Actor: its engine, and how it is sampled from."""

from __future__ import annotations

from pydantic import Field

from megatron_rl.config import ConfigRecord
from megatron_rl.engines.engine_config import DtypeName, EngineConfig
from megatron_rl.rollout.base import SamplingParams


class RolloutConfig(ConfigRecord):
    """The engine that generates samples."""

    engine: str = "local"
    """Name of a registered rollout engine."""
    tp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks of one rollout replica."""
    ep: int = Field(default=1, ge=1)
    """Expert-parallel ranks among these `tp` (MoE only): each holds whole experts instead of a part of all."""
    dtype: DtypeName | None = None
    """Dtype of the rollout weights; None = the training dtype."""
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
    """Options of the engine: kv_cache_bytes, prefill_tokens, max_context of local; of sglang, see docs/sglang.md."""


class ActorConfig(EngineConfig):
    """An Actor."""

    value_head: bool = False
    """A value head beside the output layer, for a critic on shared weights (`PPO.Config.shared_critic`)."""
    sampling: SamplingParams = SamplingParams()
    """Defaults of `actor.sample`."""
    rollout: RolloutConfig = RolloutConfig()
    """The rollout engine."""
