"""`convert`: a Hugging Face folder or a Megatron checkpoint into either of the two.

Both ways it streams, some rows of one tensor at a time (`weights.file_copies`): no process ever holds a file, a rank's
part or even a tensor of the model. One process does it all, in threads that write a file each; under torchrun the ranks
share the files.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch

from megatron_rl.config import ConfigError
from megatron_rl.engines.megatron.checkpoint.converted import write_converted
from megatron_rl.models.checkpoint_digests import find_damage
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.weights.file_copies import in_threads, num_threads
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
    drop_mtp: bool = False,
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
        verify: compare a checkpoint's files with their digests.
        drop_mtp: leave out layers of multi-token prediction, which otherwise are refused.

    Returns:
        The target.

    Raises:
        ConfigError: the source is neither of the two, or is damaged.
    """
    if to not in ("hf", "megatron"):
        raise ConfigError(f"cannot convert to {to!r}: expected 'hf' or 'megatron'")
    with open_weights(source, config, drop_mtp) as opened:
        writer = HFFolderWriter(target, opened.description, dtype or opened.dtypes, max_shard_bytes, overwrite)
        context = ParallelContext.create(ParallelSizes())
        checkpoint = opened.checkpoint if verify else None
        with _verified(checkpoint, context, tensors_only=config is not None) as refuse_damage:
            if to == "hf":
                _to_hf(opened, writer, context, refuse_damage)
            else:
                write_converted(opened, writer, context, sizes or ParallelSizes(), refuse_damage)
    return writer.folder


@contextlib.contextmanager
def _verified(checkpoint: Path | None, context: ParallelContext, tensors_only: bool) -> Iterator[Callable[[], None]]:
    """Compare a checkpoint's files with their digests, each rank its share, while the body copies them.

    Where the user gives a config, the checkpoint's own description may be changed, so only tensors are compared.

    Yields:
        What raises ConfigError on every rank if there is damage; to be called before anything is published.
    """
    with ThreadPoolExecutor(1, "verify") as pool:
        looking = None
        if checkpoint is not None:
            looking = pool.submit(find_damage, checkpoint, context.rank, context.world_size, tensors_only)

        def refuse() -> None:
            found = context.gather_objects(looking.result() if looking is not None else "")
            if damage := next(filter(None, found), None):
                raise _damaged(checkpoint, damage)

        try:
            yield refuse
        except Exception:  # which the damage may be the reason of
            if looking is not None and (damage := looking.result()):
                raise _damaged(checkpoint, damage) from None
            raise


def _damaged(checkpoint: Path | None, damage: str) -> ConfigError:
    return ConfigError(
        f"checkpoint {checkpoint} is damaged: {damage}: restore it from a copy, or convert another one "
        "(--no-verify converts it as it is)"
    )


def _to_hf(
    opened: OpenedWeights, writer: HFFolderWriter, context: ParallelContext, refuse_damage: Callable[[], None]
) -> None:
    together = context.agreement
    mine = writer.files[context.rank :: context.world_size]
    files = iter(mine)

    def write(number: int, stop: threading.Event) -> None:
        while not stop.is_set() and (file := next(files, None)) is not None:
            writer.stream(file, opened.tensors)

    with writer.writing(together, context.rank == 0):
        with together.attempt():
            in_threads(num_threads(len(mine), context.world_size), write)
        refuse_damage()
        with together.attempt():
            if context.rank == 0:
                if opened.value_head is not None:
                    write_value_head(writer.partial, opened.value_head)
                writer.commit()
