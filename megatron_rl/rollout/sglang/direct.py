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
            payloads = self.gather(named_tensors({name: shards[name] for name in names}))
            self.lead(lambda payloads=payloads: self._post(clients, payloads))  # type: ignore[misc]

    def _post(self, clients: Sequence[SGLangClient], payloads: Sequence[str]) -> None:
        self.each(clients, lambda client: client.update_weights_from_tensor(payloads, load_format="direct"))
