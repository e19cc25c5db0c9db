"""`convert`: a Hugging Face folder or a Megatron checkpoint into either of the two.

Both ways it streams, some rows of one tensor at a time (`weights.hf_folder.BLOCK_BYTES`): no process ever holds a file,
a rank's part or even a tensor of the model. One process does it all; under torchrun the ranks share the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from megatron_rl.config import ConfigError
from megatron_rl.engines.megatron.checkpoint.converted import write_converted
from megatron_rl.models.checkpoint_digests import find_damage
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.weights.hf_folder import MAX_SHARD_BYTES, HFFolderWriter
from megatron_rl.weights.opened_weights import OpenedWeights, open_weights
from megatron_rl.weights.value_head_file import write_value_head


def convert(
    source: str | Path,
    target: str | Path,
    to: Literal["hf", "megatron"],
    sizes: ParallelSizes | None = None,
    *,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Convert ``source`` into the folder ``target``, which appears complete or not at all. Collective under torchrun.

    Args:
        to: "hf" for a Hugging Face folder, "megatron" for a distributed checkpoint.
        sizes: the layout that a checkpoint's files are cut for; it loads into any.
        config: see `weights.opened_weights.open_weights`.
        dtype: of the result; None keeps that of each tensor. What a Megatron checkpoint stores as one tensor (queries,
            keys and values, and layers that are all alike) gets the widest of its dtypes.
        max_shard_bytes: largest file of a Hugging Face folder.
        overwrite: replace an existing target.
        verify: compare a checkpoint's files with their digests first.

    Returns:
        The target.

    Raises:
        ConfigError: the source is neither of the two, or is damaged.
    """
    if to not in ("hf", "megatron"):
        raise ConfigError(f"cannot convert to {to!r}: expected 'hf' or 'megatron'")
    with open_weights(source, config) as opened:
        writer = HFFolderWriter(target, opened.description, dtype or opened.dtypes, max_shard_bytes, overwrite)
        context = ParallelContext.create(ParallelSizes())
        if verify and opened.checkpoint is not None:
            _refuse_damage(opened.checkpoint, context, tensors_only=config is not None)
        if to == "hf":
            _to_hf(opened, writer, context)
        else:
            write_converted(opened, writer, context, sizes or ParallelSizes())
    return writer.folder


def _refuse_damage(checkpoint: Path, context: ParallelContext, tensors_only: bool) -> None:
    """Compare files with their digests, each rank its share; raises ConfigError on every rank. Where the user gives a
    config, the checkpoint's own description may be changed, so only tensors are compared."""
    found = context.gather_objects(find_damage(checkpoint, context.rank, context.world_size, tensors_only))
    if damage := next(filter(None, found), None):
        raise ConfigError(
            f"checkpoint {checkpoint} is damaged: {damage}: restore it from a copy, or convert another one "
            "(--no-verify converts it as it is)"
        )


def _to_hf(opened: OpenedWeights, writer: HFFolderWriter, context: ParallelContext) -> None:
    together = context.agreement
    with writer.writing(together, context.rank == 0):
        with together.attempt():
            for file in writer.files[context.rank :: context.world_size]:
                writer.stream(file, opened.tensors)
        with together.attempt():
            if context.rank == 0:
                if opened.value_head is not None:
                    write_value_head(writer.partial, opened.value_head)
                writer.commit()
