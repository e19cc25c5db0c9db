"""Delivery "direct": each tensor-parallel rank of a server gets exactly its own shards, by SGLang's own names.

No rank ever holds a full tensor. SGLang's loader "direct" copies each tensor into the parameter of its name, so there
is nothing to fuse or cut there. What a model derives from its weights would be stale; the checksums refuse that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_rl.rollout.sglang.client import SGLangClient
from megatron_rl.rollout.sglang.delivery import DELIVERIES
from megatron_rl.rollout.sglang.handover import Handover, buckets
from megatron_rl.rollout.sglang.payload import named_tensors


@DELIVERIES.register("direct")
class DirectDelivery(Handover):
    """See `Handover`."""

    def write(self, clients: Sequence[SGLangClient], shards: Mapping[str, Tensor]) -> None:
        sizes = {name: math.prod(shape) * self.dtype.itemsize for name, shape in self._shapes.items()}
        for names in buckets(sizes, self.bucket_bytes):
            part = {name: shards[name] for name in names}
            # A handle counts its one reader, so each server gets one of its own.
            count = self.num_servers if self.shared else 1
            payloads = self.gather([named_tensors(part, self.shared) for _ in range(count)])
            self.lead(lambda payloads=payloads: self._post(clients, payloads))  # type: ignore[misc]

    def _post(self, clients: Sequence[SGLangClient], payloads: Sequence[Sequence[str]]) -> None:
        """``payloads``: of each rank, one for each server or one for all."""
        of = {client.url: [texts[i % len(texts)] for texts in payloads] for i, client in enumerate(clients)}
        self.each(clients, lambda client: client.update_weights_from_tensor(of[client.url], load_format="direct"))
