"""Which checkpoint a run starts from: the requested one, if its files are intact.

With ``resume: auto`` a damaged checkpoint is skipped, with a warning, and the newest intact one is used. A damaged one
that was named is an error, and so is a folder in which all are damaged: a run never restarts from the beginning.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_rl.config import ConfigError
from megatron_rl.engines.state_storage import WriteError
from megatron_rl.models.checkpoint_digests import find_damage
from megatron_rl.parallel import ParallelContext
from megatron_rl.trainer.retention import complete_checkpoints

logger = logging.getLogger(__name__)

FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or no readable one is left; one line, the same on every rank."""


def find_checkpoint(folder: Path, resume: str) -> Path | None:
    """The checkpoint to start from.

    Raises:
        ConfigError: the named checkpoint does not exist, or ``resume`` is "never" and ``folder`` has checkpoints.
    """
    existing = complete_checkpoints(folder)
    if resume == "never":
        if existing:
            raise ConfigError(
                f"{folder} already holds {existing[-1].name}, and resume=never: give another "
                "trainer.output_dir, or resume=auto to continue that run"
            )
        return None
    if resume == "auto":
        return existing[-1] if existing else None
    path = Path(resume)
    if not path.is_dir() and path.name == resume:
        path = folder / resume
    if not path.is_dir():
        raise ConfigError(
            f"trainer.resume={resume}: no such folder; expected auto, never, a checkpoint folder or its name "
            f"(known: {', '.join(str(p) for p in existing) or 'none'})"
        )
    return path


def intact_checkpoint(folder: Path, resume: str, context: ParallelContext) -> Path | None:
    """As `find_checkpoint`, verified. Collective: the files are shared out over the ranks.

    Raises:
        CheckpointError: the named checkpoint is damaged, or all are.
    """
    requested = find_checkpoint(folder, resume)
    if requested is None or not (damage := shared_damage(requested, context)):
        return requested
    what = f"checkpoint {requested} is damaged: {damage}"
    others = [
        path for path in reversed(complete_checkpoints(requested.parent)) if path.resolve() != requested.resolve()
    ]
    intact = next((path for path in others if not shared_damage(path, context)), None)
    if intact is None:
        raise CheckpointError(
            f"{what}; {folder} holds no intact one: restore it from a copy, or start afresh in another "
            "trainer.output_dir (trainer.verify_checkpoints=false loads it as it is)"
        )
    if resume != "auto":
        raise CheckpointError(f"{what}; the newest intact one is {intact}: trainer.resume={intact.name}")
    logger.warning("%s; continuing from %s, the newest intact one", what, intact)
    return intact


def shared_damage(checkpoint: Path, context: ParallelContext) -> str:
    """What any rank finds wrong with its share of the files; the same on every rank. Collective."""
    found = context.gather_objects(find_damage(checkpoint, context.rank, context.world_size))
    return next((damage for damage in found if damage), "")


def attempt_write(write: Callable[[], object], checkpoint: Path, partial: Path, context: ParallelContext) -> None:
    """Call ``write``, a part of writing ``checkpoint``, on every rank; if it fails, delete the folder ``partial``.

    Raises:
        CheckpointError: what went wrong, and which checkpoint the run can continue from.
    """
    try:
        write()
    except WriteError as error:
        said = _failure(error, checkpoint) if context.rank == 0 else ""
        if context.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(context.gather_objects(said)[0]) from None


def _failure(error: WriteError, checkpoint: Path) -> str:
    folder = next(path for path in checkpoint.parents if path.is_dir())
    full = any(reason in str(error) for reason in FULL)
    kept = complete_checkpoints(checkpoint.parent)
    stands = f"{kept[-1].name} stands, and the same command continues from there" if kept else "there is none yet"
    free = shutil.disk_usage(folder).free / 2**20
    return (
        f"{'disk full' if full else 'the disk failed'}: checkpoint {checkpoint} could not be written "
        f"({error}; {free:,.1f} MiB were free); {stands}"
        + (": free some space, or lower trainer.keep_last" if full else "")
    )
