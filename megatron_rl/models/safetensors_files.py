"""Writing safetensors files and folders with the permissions that the umask allows."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors``, on any device. safetensors itself makes files that only their owner can read (0600)."""
    with path.open("wb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777  # what umask and the folder's ACL make of a new file
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    path.chmod(mode)


@contextlib.contextmanager
def shared_temporary_folder(prefix: str, parent: str | None) -> Iterator[Path]:
    """A temporary folder that processes of other users may look into, as far as the umask lets them.

    Args:
        parent: where it lies; None = the temporary files of this machine.
    """
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name:
        inner = Path(name) / "files"
        inner.mkdir()
        Path(name).chmod(inner.stat().st_mode & 0o777)
        yield inner


def write_parts(folder: Path, tensors: Mapping[str, Tensor], number: int) -> None:
    """Write ``tensors`` as the ``number``-th file of ``folder``; nothing where there are none."""
    if tensors:
        write_safetensors(folder / f"model-{number:05d}.safetensors", tensors)
