"""Checks of a job's own model chunks: their place in the pipeline, and their parameters by name and shape.

What they compute is read by `adopted_architecture.py` and proved by `model_proof.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.engines.megatron.model.value_head import ValueHead
from megatron_rl.parallel import ParallelContext
from megatron_rl.reshard import Layout
from megatron_rl.weights.fill import check_tensors

logger = logging.getLogger(__name__)


def check_place(chunks: Sequence[LanguageModule], context: ParallelContext, value_head: bool) -> None:
    """Raise ConfigError unless there is one bare chunk for each virtual stage, with embedding and output layer where
    the pipeline has them, and a value head exactly if ``value_head``."""
    sizes, at = context.sizes, context.coordinates
    if len(chunks) != sizes.vpp:
        raise ConfigError(f"{len(chunks)} model chunks were given, but parallel_state has vpp={sizes.vpp} per rank")
    for stage, chunk in enumerate(chunks):
        first = at.pp == 0 and stage == 0
        last = at.pp == sizes.pp - 1 and stage == sizes.vpp - 1
        if (bool(chunk.pre_process), bool(chunk.post_process)) != (first, last):
            raise ConfigError(
                f"pipeline stage {at.pp} chunk {stage} was built with pre_process={chunk.pre_process}, "
                f"post_process={chunk.post_process}, expected {first} and {last}: pass what parallel_state says"
            )
    if chunks[-1].post_process and isinstance(chunks[-1].output_layer, ValueHead) != value_head:
        raise ConfigError(
            f"the output layer of the last model chunk is a {type(chunks[-1].output_layer).__name__}: a critic or "
            "reward model needs megatron_rl.engines.megatron.model.value_head.ValueHead, a policy the vocabulary's"
        )


def check_parameters(layout: Layout, rank: int, tensors: Mapping[str, Tensor]) -> None:
    """Raise ConfigError unless the parameters of this rank are those of the layout, by name and shape."""
    check_tensors(layout, rank, tensors)
    known = {shard.name for shard in layout.shards(rank)}
    unknown = sorted(tensors.keys() - known)
    if unknown:
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise ConfigError(
            f"the Megatron model has parameters that no supported decoder has: {', '.join(unknown[:4])}{more}. They "
            "would be trained and never sampled from or exported: build the model without them, or add its family in "
            "megatron_rl/models"
        )


def warn_of_dropout(config: object) -> None:
    """Log what happens with dropout in the configuration of an adopted model, and the remedy."""
    active = {name: value for name in ("hidden_dropout", "attention_dropout") if (value := getattr(config, name)) > 0.0}
    if active:
        given = ", ".join(f"{name}={value}" for name, value in active.items())
        logger.warning(
            "the Megatron model has %s (Megatron-LM's default is 0.1): samples and log-probabilities are computed "
            "without dropout, optimizer steps with it, so the policy in training is not the one that sampled and the "
            "ratio between them is noise even before the first step; build the model with --hidden-dropout 0 "
            "--attention-dropout 0",
            given,
        )


def log_auxiliary_losses(config: object) -> None:
    """Log that the routers of an adopted model add auxiliary losses to every optimizer step."""
    coefficients = {name: getattr(config, name) for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff")}
    if getattr(config, "num_moe_experts", None) and any(_positive(value) for value in coefficients.values()):
        given = ", ".join(f"{name}={value}" for name, value in coefficients.items())
        logger.info("routers add their auxiliary losses to the loss of every optimizer step: %s", given)


def _positive(value: object) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(one, int | float) and one > 0 for one in values)
