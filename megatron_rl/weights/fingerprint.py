"""`Fingerprint`: whether a rank's weights are still those of a moment ago, whoever may have written to them.

Torch's version counters do not show it: Megatron-Core's optimizers write through ``parameter.data`` and through the
buffers behind it, which no counter sees. So it is a checksum of all bits: one pass over memory, about as much as
decoding one token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rl.ops.span_checksum import span_checksum, tensor_key
from megatron_rl.reshard.layout import matrix_shape


class Fingerprint:
    """Checksums of tensors by name. The tables are made once for tensors of the same names, shapes and dtypes."""

    def __init__(self) -> None:
        self._signature: list[tuple[str, torch.dtype, torch.Size]] = []
        self._groups: list[tuple[list[str], Tensor]] = []

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """The checksum of each tensor."""
        signature = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
        fresh = signature != self._signature
        if fresh:
            self._groups, self._signature = _grouped(tensors), signature
        sums: dict[str, int] = {}
        for names, table in self._groups:
            held = [tensors[name].detach().contiguous() for name in names]
            values = span_checksum(held, table, len(names), checked=fresh)
            sums.update(zip(names, values.tolist(), strict=True))
        return sums


def _grouped(tensors: Mapping[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Names and table of each group that one call of `span_checksum` takes."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, tensor in tensors.items():
        by_kind.setdefault((tensor.dtype, tensor.device), []).append(name)
    groups = []
    for (dtype, _), names in by_kind.items():
        rows = []
        for number, name in enumerate(names):
            num_rows, num_cols = matrix_shape(tuple(tensors[name].shape))
            rows.append((number, number, tensor_key(name, dtype), 0, 0, 0, num_rows, num_cols, num_cols))
        groups.append((names, torch.tensor(rows, dtype=torch.int64)))
    return groups
