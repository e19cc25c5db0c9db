"""Deliveries of whole tensors, which the server cuts itself: slower than "direct", for what that cannot do.

"flattened_bucket": over HTTP, to each tensor-parallel rank the same payload. "disk": through a folder that both sides
see; the only one that runs all of SGLang's own steps after loading. "distributed": broadcast over a process group that
servers join (`update_group`), for servers that share neither machine nor disk with the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from megatron_rl.models.safetensors_files import shared_temporary_folder, write_parts
from megatron_rl.rollout.sglang.client import SGLangClient
from megatron_rl.rollout.sglang.delivery import DELIVERIES
from megatron_rl.rollout.sglang.full_tensors import FullTensors
from megatron_rl.rollout.sglang.handover import Handover
from megatron_rl.rollout.sglang.payload import flattened_bucket, serialize
from megatron_rl.rollout.sglang.update_group import UpdateGroups

TIMEOUT = 600.0  # seconds


class FullDelivery(Handover):
    """Collects whole tensors on the replica's first rank; subclasses send each bucket."""

    runs_loader = True

    @cached_property
    def full(self) -> FullTensors:
        return FullTensors(self.layout, self.ranks, self.rank, self.group, self.dtype, self.bucket_bytes)

    def write(self, clients: Sequence[SGLangClient], shards: Mapping[str, Tensor]) -> None:
        for tensors in self.full.collect(shards):
            self.lead(lambda tensors=tensors: self.send(clients, tensors))  # type: ignore[misc]

    def send(self, clients: Sequence[SGLangClient], tensors: Mapping[str, Tensor]) -> None:
        """One bucket, on the first rank."""
        raise NotImplementedError


@DELIVERIES.register("flattened_bucket")
class BucketDelivery(FullDelivery):
    """See the module."""

    def send(self, clients: Sequence[SGLangClient], tensors: Mapping[str, Tensor]) -> None:
        bucket, once = flattened_bucket(tensors), ""
        if not self.shared:
            once = serialize(bucket)

        async def post(client: SGLangClient) -> None:
            payloads = [once or serialize(bucket, shared=True) for _ in self.ranks]
            await client.update_weights_from_tensor(payloads, load_format="flattened_bucket")

        self.each(clients, post)


@DELIVERIES.register("disk")
class DiskDelivery(FullDelivery):
    """See the module.

    Args:
        folder: where to write, seen alike by the servers; None = the temporary files of this machine.
    """

    needs_session = False

    def __init__(self, folder: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._parent = folder

    def write(self, clients: Sequence[SGLangClient], shards: Mapping[str, Tensor]) -> None:
        with shared_temporary_folder("weights-", self._parent) as folder:
            for number, tensors in enumerate(self.full.collect(shards)):
                self.lead(lambda t=tensors, n=number: write_parts(folder, t, n))  # type: ignore[misc]
            self.lead(lambda: self.each(clients, lambda c: c.update_weights_from_disk(str(folder), flush_cache=False)))


@DELIVERIES.register("distributed")
class DistributedDelivery(FullDelivery):
    """See the module.

    Args:
        address: of this machine, as the servers reach it; None = found out.
        timeout: seconds that a server may take to join, and one broadcast.
    """

    def __init__(self, address: str | None = None, timeout: float = TIMEOUT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._groups = UpdateGroups(self.loop, len(self.ranks), address, timeout)

    def write(self, clients: Sequence[SGLangClient], shards: Mapping[str, Tensor]) -> None:
        device = next(iter(shards.values())).device
        self.lead(lambda: self._groups.join(clients, device))
        super().write(clients, shards)

    def send(self, clients: Sequence[SGLangClient], tensors: Mapping[str, Tensor]) -> None:
        self._groups.broadcast(clients, tensors)
