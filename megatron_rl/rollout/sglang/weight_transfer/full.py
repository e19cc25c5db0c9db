"""Transfers of whole Hugging Face tensors, which the server cuts itself: slower than "direct", for what that cannot do.

`FullTensors` brings them together on the first rank of a replica, a bucket at a time: the shards that the replica's
ranks hold are one layout, whole tensors on one rank another, and each bucket is a small reshard between the two.
"flattened_bucket" posts them over HTTP, to each tensor-parallel rank the same payload.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.models import logical_tensors
from megatron_rl.models.parameters import Shape, whole
from megatron_rl.reshard import Layout, LocalTransport, P2PTransport, Resharder, Shard, shifted
from megatron_rl.reshard.buckets import ALIGNMENT
from megatron_rl.reshard.layout import restricted
from megatron_rl.rollout.sglang.sglang_client import SGLangClient
from megatron_rl.rollout.sglang.weight_transfer.base import TRANSFERS, WeightTransfer
from megatron_rl.rollout.sglang.weight_transfer.wire import flattened_bucket, requests, serialize


class FullTransfer(WeightTransfer):
    """Collects whole tensors on the replica's first rank; subclasses post each request."""

    runs_loader = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._collectors: dict[frozenset[str], FullTensors] = {}
        # The shards of two buckets, and on the first rank the whole tensors, once more as they travel.
        self.bucket_copies = 2 + 2 * len(set(self.layout.replica_of.values()))

    def send(self, shards: Mapping[str, Tensor], prepared: Sequence[Any] | None) -> None:
        for tensors in self._collector(frozenset(shards)).collect(shards):
            self.lead(lambda tensors=tensors: self.send_whole(tensors))  # type: ignore[misc]

    @abstractmethod
    def send_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """One request, on the first rank: return when servers have read it."""

    @functools.cached_property
    def _whole_shapes(self) -> Mapping[str, Shape]:
        return logical_tensors(self.architecture)

    def _collector(self, names: frozenset[str]) -> FullTensors:
        if names not in self._collectors:
            layout = self.layout

            def emit(replica: Hashable) -> list[Shard]:
                return [shard for shard in layout.shards_of(replica) if shard.name in names]

            part = replace(layout, emit=emit, symmetry=None)
            self._collectors[names] = FullTensors(
                part, self._whole_shapes, self.ranks, self.rank, self.group, self.dtype, self.bucket_bytes
            )
        return self._collectors[names]


@TRANSFERS.register("flattened_bucket")
class BucketTransfer(FullTransfer):
    """See the module."""

    def send_whole(self, tensors: Mapping[str, Tensor]) -> None:
        bucket, once = flattened_bucket(tensors), ""
        if not self.shared:
            once = serialize(bucket)

        async def post(client: SGLangClient) -> None:
            payloads = [once or serialize(bucket, shared=True) for _ in self.ranks]
            await client.update_weights_from_tensor(payloads, load_format="flattened_bucket")

        self.each(post)


class FullTensors:
    """One rank's part.

    Args:
        shapes: of the whole tensors, and perhaps of others.
        ranks: of the replica; the first one gets the tensors.
        bucket_bytes: of whole tensors at a time; a larger one goes alone.
    """

    def __init__(
        self,
        layout: Layout,
        shapes: Mapping[str, Shape],
        ranks: Sequence[int],
        rank: int,
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        bucket_bytes: int,
    ) -> None:
        self._layout = replace(layout, replica_of={r: layout.replica_of[r] for r in ranks}, symmetry=None)
        self._leader, self._rank, self._bucket_bytes = ranks[0], rank, bucket_bytes
        self._dtypes = layout.dtypes(dtype)
        self._transport = LocalTransport() if group is None else P2PTransport(group)
        shards = (shard for replica in self._layout.replicas for shard in self._layout.shards_of(replica))
        held = dict.fromkeys(span.tensor for shard in shards for span in shard.spans)
        self._shapes = {name: shapes[name] for name in held}
        self._resharders: list[tuple[list[str], Resharder]] = []

    def collect(self, shards: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Collective over the replica: bucket after bucket by Hugging Face names; empty but on the first rank. The
        tensors of a bucket are overwritten by the next."""
        memory = torch.empty(0, dtype=torch.uint8)
        logical = shifted(shards, self._layout, Layout("whole tensors", {}, lambda replica: ()), self._rank)
        for names, resharder in self._planned():
            tensors: dict[str, Tensor] = {}
            if self._rank == self._leader:
                sizes = [-(-self._num_bytes(name) // ALIGNMENT) * ALIGNMENT for name in names]
                device = next(iter(shards.values())).device
                memory = (
                    memory
                    if memory.numel() >= sum(sizes)
                    else torch.empty(sum(sizes), dtype=torch.uint8, device=device)
                )
                parts = memory[: sum(sizes)].split(sizes)
                for name, part in zip(names, parts, strict=True):
                    flat = part[: self._num_bytes(name)].view(self._dtypes.of(name))
                    tensors[name] = flat.view(self._shapes[name])
            resharder.run(logical, tensors)
            yield tensors

    def _num_bytes(self, name: str) -> int:
        return math.prod(self._shapes[name]) * self._dtypes.of(name).itemsize

    def _planned(self) -> list[tuple[list[str], Resharder]]:
        if not self._resharders:
            sizes = {name: self._num_bytes(name) for name in self._shapes}
            for names in requests(sizes, self._bucket_bytes):
                tensors = [whole(name, name, self._shapes[name]) for name in names]
                target = Layout("whole tensors", {self._leader: 0}, lambda replica, tensors=tensors: tensors)  # type: ignore[misc]
                source = restricted(self._layout, set(names))
                resharder = Resharder(source, target, self._rank, self._transport, self._dtypes)
                self._resharders.append((names, resharder))
        return self._resharders
