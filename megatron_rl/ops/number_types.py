"""Number types as the compiled operations name them (csrc/include/numbers.h, `NumberType`)."""

from __future__ import annotations

import torch

RAW = 0
NUMBER_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def number_types(source: torch.dtype, destination: torch.dtype) -> tuple[int, int]:
    """Codes of a copy or cast; equal dtypes of any kind are copied as raw bits."""
    return (RAW, RAW) if source == destination else (NUMBER_TYPES[source], NUMBER_TYPES[destination])
