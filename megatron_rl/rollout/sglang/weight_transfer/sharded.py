"""Transfer "direct": each tensor-parallel rank of a server gets exactly its own shards, by SGLang's own names.

No rank ever holds a full tensor. SGLang's loader "direct" copies each tensor into the parameter of its name, so there
is nothing to fuse or cut there. What a model derives from its weights would be stale; the checksums refuse that.

Servers on this machine that have our receiver take a whole update in one request (`bucket_relay`); others, and buckets
that no relay can carry, take a request for each bucket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_rl.rollout.sglang.sglang_client import SGLangClient
from megatron_rl.rollout.sglang.weight_transfer.base import INLINE_BYTES, TRANSFERS, WeightTransfer
from megatron_rl.rollout.sglang.weight_transfer.bucket_mailbox import RECEIVER
from megatron_rl.rollout.sglang.weight_transfer.bucket_relay import REQUEST_SECONDS, BucketRelay
from megatron_rl.rollout.sglang.weight_transfer.wire import (
    free_shared_memory,
    named_tensors,
    requests,
    shared_buffer,
    unshared_bytes,
)


@TRANSFERS.register("direct")
class ShardedTransfer(WeightTransfer):
    """See `WeightTransfer`. Servers read a bucket while this process goes on."""

    _relay: BucketRelay | None = None

    def new_buffer(self, num_bytes: int, device: torch.device) -> Tensor:
        """Shared from the beginning where there is room: servers on this machine then need no second copy of it."""
        if device.type == "cpu" and free_shared_memory() > 2 * len(self.ranks) * num_bytes:
            return shared_buffer(num_bytes)
        return super().new_buffer(num_bytes, device)

    def relay(self, shards: Mapping[str, Tensor], fault: str = "") -> str | None:
        relay = self._relay
        if relay is None:
            return fault
        fits = bool(shards) and not fault and not self.misuse(shards) and not unshared_bytes(shards.values())
        if relay.post(fits, lambda: self._mails(self.prepare(shards)), self.posting_failure):
            return None
        fault = relay.error or self.posting_failure() or fault
        self.drop_relay()  # and so no server waits for a bucket when it is asked how it is
        return fault

    def drop_relay(self) -> None:
        relay, self._relay = self._relay, None
        if relay is not None:
            relay.close()

    def prepare(self, shards: Mapping[str, Tensor]) -> list[list[str]]:
        """Request -> server -> payload."""
        limit = self.bucket_bytes if self.shared else min(self.bucket_bytes, INLINE_BYTES)
        # A handle counts its one reader, so each server gets one of its own.
        count = self.num_servers if self.shared else 1
        cut = requests({name: tensor.nbytes for name, tensor in shards.items()}, limit)
        return [[named_tensors({n: shards[n] for n in names}, self.shared) for _ in range(count)] for names in cut]

    def send(self, shards: Mapping[str, Tensor], prepared: Sequence[list[list[str]]] | None) -> None:
        if self.shared and self.have_receiver:
            own = prepared[self.ranks.index(self.rank)] if prepared else self.prepare(shards)
            with self.agreement.attempt("making mailboxes") as attempt:
                attempt.run(self._make_relay)
            assert self._relay is not None
            paths = self.gather(self._relay.paths)
            self.post(lambda client: self._request(client, [[of_rank] for of_rank in self._openings(paths)], RECEIVER))
            self._relay.put(self._mails(own))
            return
        of_ranks = prepared or self.gather(self.prepare(shards))
        self.post(lambda client: self._request(client, of_ranks, "direct"))

    def _make_relay(self) -> None:
        try:
            self._relay = BucketRelay(self.agreement, self.shapes, self.num_servers)
        except OSError as error:
            raise RuntimeError(f"weights were not delivered: no mailbox in shared memory: {error}") from error

    def _openings(self, paths: Sequence[Sequence[str]]) -> list[list[str]]:
        """Rank -> server -> what makes its receiver open the mailbox."""
        return [[named_tensors({path: torch.zeros(1)}) for path in of_servers] for of_servers in paths]

    def _mails(self, payloads: Sequence[Sequence[str]]) -> list[bytes]:
        """What each server's mailbox of this rank gets of a bucket."""
        return ["\n".join(texts).encode() for texts in zip(*payloads, strict=True)]

    async def _request(self, client: SGLangClient, of_ranks: Sequence[Sequence[Sequence[str]]], loader: str) -> None:
        """``of_ranks``: rank -> request -> server -> payload."""
        number = next(i for i, other in enumerate(self.clients) if other is client)
        for texts in zip(*of_ranks, strict=True):
            payloads = [of_servers[number % len(of_servers)] for of_servers in texts]
            await client.update_weights_from_tensor(payloads, load_format=loader, timeout=REQUEST_SECONDS)
