"""`LazyTensor`: a source tensor that is computed when it is read, so that a rank never holds all of them at once.

A frozen weight with its adapter merged is one: each is made as its turn comes to be sent, and dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.reshard.layout import Layout

CACHED_TENSORS = 2  # neighbouring messages share a tensor, and a message often spans two


@dataclass(frozen=True, eq=False, slots=True)
class LazyTensor:
    """What ``compute`` returns: a new contiguous tensor like ``like``, with the same bits at each call."""

    like: Tensor
    compute: Callable[[], Tensor]

    @property
    def shape(self) -> torch.Size:
        return self.like.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device


Readable = Tensor | LazyTensor


def read(tensor: Readable) -> Tensor:
    """The values, without a gradient."""
    return (tensor.compute() if isinstance(tensor, LazyTensor) else tensor).detach()


def shifted(tensors: Mapping[str, Readable], source: Layout, target: Layout, rank: int) -> Mapping[str, Readable]:
    """This rank's ``tensors`` of layout ``source`` with the values that ``target`` holds: a `LazyTensor` where these
    differ (`Layout.held`), computed in the source's dtype.

    Raises:
        ValueError: tensors that share a shard need different values.
    """
    if not source.held and not target.held:
        return tensors
    result = dict(tensors)
    for shard in source.shards(rank):
        adds = {target.added(span.tensor) - source.added(span.tensor) for span in shard.spans}
        if len(adds) > 1:
            raise ValueError(f"{shard.name}: {target.name!r} holds parts of it with {sorted(adds)} added, expected one")
        if adds and adds != {0.0} and shard.name in tensors:
            result[shard.name] = _plus(tensors[shard.name], adds.pop())
    return result


def _plus(tensor: Readable, add: float) -> LazyTensor:
    return LazyTensor(tensor.like if isinstance(tensor, LazyTensor) else tensor, lambda: read(tensor) + add)


class LazyTensorCache:
    """The lazy tensors that were read last."""

    def __init__(self, size: int = CACHED_TENSORS) -> None:
        self._size = size
        self._tensors: OrderedDict[Hashable, Tensor] = OrderedDict()

    def read(self, key: Hashable, tensor: LazyTensor) -> Tensor:
        """The values of ``tensor``, which is always the same for one ``key``."""
        if key not in self._tensors:
            while len(self._tensors) >= self._size:
                self._tensors.popitem(last=False)
            self._tensors[key] = read(tensor)
        self._tensors.move_to_end(key)
        return self._tensors[key]

    def clear(self) -> None:
        self._tensors.clear()
