"""Saving a model in training: a Hugging Face folder, adapters in PEFT's format, the description in a checkpoint.

All functions are called on every rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_rl.config import ConfigError
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.models.peft_names import is_mixture, module_places
from megatron_rl.weights.hf_folder import HFDescription
from megatron_rl.weights.hf_out import save_hf
from megatron_rl.weights.peft_out import AdapterPart, assembled, parts_of, write_peft
from megatron_rl.weights.value_head_file import SHARED_VALUE_HEAD, write_value_head


def save_pretrained(
    engine: TrainingEngine, tokenizer: Any, folder: Path, overwrite: bool, dtype: torch.dtype | None
) -> Path:
    """As `TrainedWorker.save_pretrained`."""
    if _elsewhere(engine):
        return folder
    engine.sync_parameters()
    origin = engine.origin
    return save_hf(
        engine.layout,
        engine.published(),
        engine.architecture,
        folder,
        rank=engine.context.rank,
        tokenizer=tokenizer,
        hf_config=origin.hf_config,
        generation_config=origin.generation,
        dtype=dtype or origin.dtypes,
        overwrite=overwrite,
        beside=lambda partial: _write_shared_head(engine, partial),
    )


def _elsewhere(engine: TrainingEngine) -> bool:
    """Whether this is a rollout rank: the training ranks write without it."""
    split = engine.context.split
    return split is not None and split.on_rollout


def _write_shared_head(engine: TrainingEngine, folder: Path) -> None:
    """The value head beside the output layer, by one of the ranks that hold it."""
    at = engine.context.coordinates
    if not engine.shared_value_head or (at.tp, at.cp, at.dp) != (0, 0, 0):
        return
    for name, weight in engine.tensors().items():
        if name.endswith(SHARED_VALUE_HEAD):
            write_value_head(folder, weight)


def save_adapters(engine: TrainingEngine, folder: Path, base: str, overwrite: bool) -> Path:
    """As `TrainedWorker.save_adapters`."""
    if _elsewhere(engine):
        return folder
    if not engine.adapters or engine.value_model:
        raise ConfigError("save_adapters is for a policy with adapters (LoRA): use save_pretrained")
    context, layout = engine.context, engine.layout
    engine.sync_parameters()
    own: list[AdapterPart] = []
    places = module_places(engine.architecture)
    if context.rank == layout.replicas[layout.replica_of[context.rank]][0]:
        shards = {shard.name: shard for shard in layout.shards(context.rank)}
        for name, adapter in engine.adapters.items():
            own += parts_of(shards[name], adapter, places)
    parts = [part for parts in context.objects_on_rank_0(own) for part in parts]
    with context.attempt("saving adapters"):
        if context.rank == 0:
            dropout = next(iter(engine.adapters.values())).dropout
            found, mixture = assembled(parts, places), is_mixture(places)
            write_peft(folder, found, dropout, base, mixture=mixture, overwrite=overwrite)
    return folder


def describe_checkpoint(engine: TrainingEngine, tokenizer: Any, checkpoint: Path) -> None:
    """As `TrainedWorker.describe_into`."""
    origin = engine.origin
    description = HFDescription(engine.architecture, origin.hf_config, tokenizer, origin.generation)
    description.write_into(checkpoint, engine.dtype)
