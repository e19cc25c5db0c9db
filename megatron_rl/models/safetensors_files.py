"""Plain safetensors files of a Hugging Face folder, for whoever reads all ``*.safetensors`` of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_parts(folder: Path, tensors: Mapping[str, Tensor], number: int) -> None:
    """Write ``tensors`` as the ``number``-th file of ``folder``; nothing where there are none."""
    if tensors:
        save_file(dict(tensors), folder / f"model-{number:05d}.safetensors", metadata={"format": "pt"})
