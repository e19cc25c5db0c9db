"""Which checkpoint of a run is the newest: the one completed last, whatever its step number.

A run that is resumed from step 4 of ten writes steps 5, 6 and so on after step 10. The file
``.checkpoints.order`` beside the folder names them in the order in which they count; a folder without it (written by an
older version, or copied alone) is ordered by step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first; those that the order does not name come before the rest."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name.removeprefix("step_").isdigit()]
    order = _order(folder)
    place = {name: number for number, name in enumerate(order)}
    return sorted(found, key=lambda path: (place.get(path.name, -1), step_of(path)))


def step_of(checkpoint: Path) -> int:
    """The steps that its run had done."""
    return int(checkpoint.name.removeprefix("step_"))


def record_newest(folder: Path, name: str) -> None:
    """Record ``name`` as the newest complete checkpoint."""
    _write(folder, [path.name for path in complete_checkpoints(folder) if path.name != name] + [name])


def record_restored(folder: Path, restored: Path) -> None:
    """Record that the run continues from ``restored``: checkpoints written after it count as older than the others."""
    names = [path.name for path in complete_checkpoints(folder)]
    inside = restored.parent.resolve() == folder.resolve() and restored.name in names
    kept = names[: names.index(restored.name) + 1] if inside else []
    if len(kept) < len(names) and names:
        _write(folder, [name for name in names if name not in kept] + kept)


def _order_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.order")


def _order(folder: Path) -> list[str]:
    path = _order_file(folder)
    return path.read_text().split() if path.is_file() else []


def _write(folder: Path, names: Sequence[str]) -> None:
    path = _order_file(folder)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_text("".join(f"{name}\n" for name in names))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
