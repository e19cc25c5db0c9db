"""How a model is trained, whatever the engine: precision, micro-batches, adapters, optimizer, gradient reduction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from megatron_rl.collectives import CollectivesConfig
from megatron_rl.config import ConfigRecord
from megatron_rl.config.ranges import NonNegative, Positive, Seed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DtypeName = Literal["float32", "bfloat16", "float16"]
Backend = Literal["megatron", "fsdp2"]
Target = Literal[
    "linear_qkv",
    "linear_proj",
    "linear_fc1",
    "linear_fc2",
    "linear_q_proj",
    "linear_q_down_proj",
    "linear_q_up_proj",
    "linear_kv_down_proj",
    "linear_kv_up_proj",
]


class OptimizerConfig(ConfigRecord):
    """AdamW and its schedule."""

    learning_rate: NonNegative = 1e-6
    """Peak learning rate."""
    min_learning_rate: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the schedule after the warm-up."""
    decay_steps: int = Field(default=0, ge=0)
    """Optimizer steps until `min_learning_rate`; 0 = the length of the run (of `megatron-rl train`)."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    """AdamW's first-moment decay."""
    beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    """AdamW's second-moment decay."""
    epsilon: Positive = 1e-8
    """AdamW's denominator floor."""
    clip_gradient: NonNegative = 1.0
    """Largest global L2 norm of the gradient; 0 = no clipping."""
    distributed: bool = True
    """Shard optimizer state over the data-parallel ranks (Megatron's distributed optimizer)."""
    overlap_gradient_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    gradient_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32 even when weights are bf16."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Update rule; sgd (no momentum) is never sharded, as it has no state."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.min_learning_rate > self.learning_rate and self.decay != "constant":
            raise ValueError(
                f"min_learning_rate={self.min_learning_rate} is above learning_rate={self.learning_rate}: a decay ends "
                "at the smaller of the two"
            )
        return self

    @property
    def is_sharded(self) -> bool:
        """Whether Megatron's distributed optimizer is used."""
        return self.distributed and self.optimizer == "adam"


class LoraConfig(ConfigRecord):
    """Low-rank adapters in place of training all weights (Hu et al. 2021, arXiv:2106.09685)."""

    path: str | None = None
    """A folder of adapters that PEFT or `save_adapters` wrote, to start from; it says rank, alpha and target_modules.
    None = new ones. A resumed run needs the folder, too."""
    rank: int = Field(default=16, ge=1, le=1 << 16)
    """Rank of the update of each weight matrix."""
    alpha: float = Field(default=32.0, gt=0.0)
    """The update is scaled by alpha / rank."""
    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Share of an adapter's inputs that are zeroed while training; None = what ``path`` says, else 0."""
    target_modules: tuple[Target, ...] = Field(
        default=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), min_length=1
    )
    """Megatron's linear layers that get an adapter, in every layer: linear_qkv, linear_proj, and linear_fc1, linear_fc2
    of the feed-forward layer, of each expert and of the shared expert. Where attention is latent linear_qkv means all
    of its projections but the last; linear_q_proj, linear_q_down_proj, linear_q_up_proj, linear_kv_down_proj and
    linear_kv_up_proj choose single ones."""

    @model_validator(mode="after")
    def _says_once(self) -> Self:
        fields = type(self).model_fields
        given = [name for name in ("rank", "alpha", "target_modules") if getattr(self, name) != fields[name].default]
        if self.path is not None and given:
            raise ValueError(
                f"path={self.path} was given with {', '.join(given)}, which that folder says: leave it out"
            )
        return self

    def dropout_after(self, folder: float = 0.0) -> float:
        """The share of inputs that is zeroed, where the adapters that are started from say ``folder``."""
        return folder if self.dropout is None else self.dropout


class EngineConfig(ConfigRecord):
    """A model on this job's ranks, and what trains it."""

    backend: Backend | None = None
    """What trains: Megatron-Core, or the Hugging Face module itself under PyTorch FSDP2 (data parallelism only; see
    docs/fsdp2.md). None = Megatron-Core where the model has a family, else FSDP2, with a line in the log."""
    dtype: DtypeName = "float32"
    """Of the weights and of the forward pass."""
    recompute: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    lora: LoraConfig | None = None
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
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule, for models that do not bring their own."""
    collectives: CollectivesConfig = CollectivesConfig()
    """How gradients are reduced over data-parallel ranks."""
    seed: Seed = 0
    """Of sampling and mini-batch order."""

    @classmethod
    def of(cls, config: EngineConfig | Mapping[str, Any] | None, where: str) -> Self:
        """A role's ``config``: a record, its fields by name, or None for the defaults.

        Args:
            where: the role, in errors.

        Raises:
            ConfigError: a field that does not exist, or a bad value.
        """
        if isinstance(config, EngineConfig):
            known = {name: getattr(config, name) for name in cls.model_fields if name in type(config).model_fields}
            return config if isinstance(config, cls) else cls(**known)
        return cls.parse(dict(config or {}), where)

    def over(self, num_optimizer_steps: int) -> Self:
        """The same with ``decay_steps`` set to ``num_optimizer_steps`` where it is not set."""
        steps = self.optimizer.decay_steps or num_optimizer_steps
        return self.model_copy(update={"optimizer": self.optimizer.model_copy(update={"decay_steps": steps})})
