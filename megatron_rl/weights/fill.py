"""Writing one rank's tensors in place from any `TensorSource`: the last step of every load.

No rank reads more than the rectangles its layout gives it, and nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.reshard import WireFormat
from megatron_rl.reshard.buckets import shard_dtype
from megatron_rl.reshard.layout import Layout
from megatron_rl.reshard.lazy_tensor import Readable
from megatron_rl.weights.source import TensorSource, check_shape


def empty_tensors(
    layout: Layout, rank: int, dtype: torch.dtype | WireFormat, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Zeros for each shard of ``rank``: name -> tensor; ``dtype``: of all, or of each logical tensor."""
    dtypes = dtype if isinstance(dtype, WireFormat) else WireFormat(dtype)
    return {
        shard.name: torch.zeros(shard.shape, dtype=shard_dtype(shard, dtypes), device=device)
        for shard in layout.shards(rank)
    }


def fill(layout: Layout, rank: int, tensors: Mapping[str, Tensor], source: TensorSource) -> None:
    """Write the shards of ``rank`` from ``source`` in place, padding included, casting to each tensor's dtype.

    Tensors that the layout does not name (value heads, buffers) stay as they are.

    Raises:
        ConfigError: a logical tensor is missing in the source, or a local tensor is missing or misshapen.
    """
    shards = layout.shards(rank)
    check_tensors(layout, rank, tensors)
    missing = sorted({span.tensor for shard in shards for span in shard.spans if span.tensor not in source})
    if missing:
        raise ConfigError(
            f"the weights lack {len(missing)} tensors that the config needs: {', '.join(missing[:4])} ..."
        )
    with torch.no_grad():
        for shard in shards:
            target = tensors[shard.name].detach()
            assert target.is_contiguous(), f"{shard.name} is not contiguous"
            rows, cols = shard.matrix_shape
            matrix = target.view(rows, cols)
            if sum(span.numel for span in shard.spans) < rows * cols:
                matrix.zero_()
            for span in shard.spans:
                part = matrix[span.row : span.row + span.num_rows, span.col : span.col + span.num_cols]
                values, added = source.read(span), layout.added(span.tensor)
                part.copy_(values + added if added else values)


def check_tensors(layout: Layout, rank: int, tensors: Mapping[str, Readable]) -> None:
    """Raise ConfigError unless ``tensors`` has every shard of ``rank`` in its shape."""
    for shard in layout.shards(rank):
        if shard.name not in tensors:
            raise ConfigError(
                f"layout {layout.name!r} places {shard.name!r} on rank {rank}, but the model there has no such "
                f"parameter; it has {', '.join(sorted(tensors)[:4])} ..."
            )
        check_shape(shard.name, tuple(tensors[shard.name].shape), shard.shape, layout.name)
