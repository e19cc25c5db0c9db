"""The value head of a policy (a critic on shared weights) in a Hugging Face folder: ``value_head/model.safetensors``.

It lies in a sub-folder of its own because SGLang and vLLM read every safetensors file beside config.json as weights of
the language model. The tensor is named ``score.weight``, [1, hidden], as in a sequence classifier of `transformers`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.models.components.embedding import SCORE
from megatron_rl.models.safetensors_files import write_safetensors
from megatron_rl.reshard import Span
from megatron_rl.weights.source import SINGLE_FILE, SafetensorsFolder

VALUE_HEAD_FOLDER = "value_head"
SHARED_VALUE_HEAD = "value_head.weight"  # its name in Megatron chunks and checkpoints


def write_value_head(folder: Path, weight: Tensor) -> None:
    """Put ``weight``, [1, hidden], into the Hugging Face folder ``folder``."""
    (folder / VALUE_HEAD_FOLDER).mkdir()
    write_safetensors(folder / VALUE_HEAD_FOLDER / SINGLE_FILE, {SCORE: weight})


def read_value_head(folder: Path, hidden: int) -> Tensor | None:
    """The value head of a Hugging Face folder, [1, hidden]; None where it has none.

    Raises:
        ConfigError: it has one that cannot be read, or of another model.
    """
    if not (folder / VALUE_HEAD_FOLDER).is_dir():
        return None
    with SafetensorsFolder(folder / VALUE_HEAD_FOLDER) as source:
        return source.read(Span(SCORE, 0, 1, 0, hidden, 0, 0)).to(torch.float32)
