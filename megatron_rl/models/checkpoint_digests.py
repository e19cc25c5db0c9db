"""Digests of a checkpoint's files: damage, flipped bits included, is found before anything is loaded.

They lie beside the files as ``digests.xxh128``, a line for each in the form of ``xxh128sum``, whose option ``-c``
checks them as well. A checkpoint without digests (another program's, or an older one) is checked for files that are
missing or too short only.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path

import xxhash
from torch.distributed.checkpoint import FileSystemReader

from megatron_rl.config import ConfigError
from megatron_rl.models.inert_load import load_inert

FILE = "digests.xxh128"
TENSORS = (".distcp", ".metadata")
COMMON = "common.pt"  # what dist_checkpointing stores beside tensors


def digest(path: Path) -> str:
    """XXH3, 128 bits: not against forgery, but as fast as memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()  # type: ignore[arg-type]


def write_digests(folder: Path, known: Mapping[str, str]) -> None:
    """Write the digests of all files in ``folder``; ``known`` are those computed already, by path below it."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    (folder / FILE).write_text("".join(f"{known.get(name) or digest(folder / name)}  {name}\n" for name in names))


def find_damage(folder: Path, rank: int = 0, world_size: int = 1, tensors_only: bool = False) -> str:
    """What is damaged in the checkpoint ``folder``, beginning with the file's name; empty where it is intact.

    The files are shared out over ``world_size`` callers, the largest first; each reads its own.

    Args:
        tensors_only: not what describes the model and the run.
    """
    if not (folder / FILE).is_file():
        return _damaged_structure(folder) if rank == 0 else ""
    try:
        lines = [line.split("  ", 1) for line in (folder / FILE).read_text().splitlines()]
        expected = {name: value for value, name in lines if not tensors_only or name.endswith(TENSORS)}
    except (OSError, ValueError) as error:
        return f"{FILE} cannot be read ({error})"
    missing = sorted(name for name in expected if not (folder / name).is_file())
    if missing or not expected:
        return f"{missing[0] if missing else FILE} is {'missing' if missing else 'empty'}"
    by_size = sorted(expected, key=lambda name: (-(folder / name).stat().st_size, name))
    for name in by_size[rank::world_size]:
        try:
            if digest(folder / name) != expected[name]:
                return f"{name} is not as it was written (its digest differs from that in {FILE})"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def _damaged_structure(folder: Path) -> str:
    """Of a checkpoint of dist_checkpointing without digests; formats without ``.metadata`` are not looked into."""
    if not (folder / ".metadata").is_file():
        return ".metadata is missing" if any(folder.glob("*.distcp")) else ""
    try:
        stored = FileSystemReader(folder).read_metadata().storage_data
        needed: dict[str, int] = {}
        for entry in (stored or {}).values():
            needed[entry.relative_path] = max(needed.get(entry.relative_path, 0), entry.offset + entry.length)
    except (OSError, EOFError, AttributeError, ValueError, pickle.UnpicklingError, ImportError, IndexError) as error:
        return f".metadata cannot be read ({type(error).__name__}: {error})"
    for name in ("metadata.json", COMMON, *needed):
        if not (folder / name).is_file():
            return f"{name} is missing"
    for name, size in needed.items():
        if (found := (folder / name).stat().st_size) < size:
            return f"{name} is cut off ({found} of at least {size} bytes)"
    try:
        load_inert(folder / COMMON)
    except ConfigError as error:
        return f"{COMMON} cannot be read ({error})"
    return ""
