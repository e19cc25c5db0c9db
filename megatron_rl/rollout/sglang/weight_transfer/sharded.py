"""Transfer "direct": each tensor-parallel rank of a server gets exactly its own shards, by SGLang's own names.

No rank ever holds a full tensor. SGLang's loader "direct" copies each tensor into the parameter of its name, so there
is nothing to fuse or cut there. What a model derives from its weights would be stale; the checksums refuse that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_rl.rollout.sglang.sglang_client import SGLangClient
from megatron_rl.rollout.sglang.weight_transfer.base import INLINE_BYTES, TRANSFERS, WeightTransfer
from megatron_rl.rollout.sglang.weight_transfer.wire import (
    free_shared_memory,
    named_tensors,
    requests,
    shared_buffer,
)


@TRANSFERS.register("direct")
class ShardedTransfer(WeightTransfer):
    """See `WeightTransfer`. Servers read a bucket while this process goes on."""

    def new_buffer(self, num_bytes: int, device: torch.device) -> Tensor:
        """Shared from the beginning where there is room: servers on this machine then need no second copy of it."""
        if device.type == "cpu" and free_shared_memory() > 2 * len(self.ranks) * num_bytes:
            return shared_buffer(num_bytes)
        return super().new_buffer(num_bytes, device)

    def prepare(self, shards: Mapping[str, Tensor]) -> list[list[str]]:
        """Request -> server -> payload."""
        limit = self.bucket_bytes if self.shared else min(self.bucket_bytes, INLINE_BYTES)
        # A handle counts its one reader, so each server gets one of its own.
        count = self.num_servers if self.shared else 1
        cut = requests({name: tensor.nbytes for name, tensor in shards.items()}, limit)
        return [[named_tensors({n: shards[n] for n in names}, self.shared) for _ in range(count)] for names in cut]

    def send(self, shards: Mapping[str, Tensor], prepared: Sequence[list[list[str]]] | None) -> None:
        of_ranks = prepared or self.gather(self.prepare(shards))
        self.post(lambda client: self._write(client, of_ranks))

    async def _write(self, client: SGLangClient, of_ranks: Sequence[Sequence[Sequence[str]]]) -> None:
        """``of_ranks``: rank -> request -> server -> payload."""
        number = next(i for i, other in enumerate(self.clients) if other is client)
        for texts in zip(*of_ranks, strict=True):
            payloads = [of_servers[number % len(of_servers)] for of_servers in texts]
            await client.update_weights_from_tensor(payloads, load_format="direct")
