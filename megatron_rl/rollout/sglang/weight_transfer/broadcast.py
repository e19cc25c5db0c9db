"""Transfer "distributed": whole tensors, broadcast over process groups that servers join, for servers that share
neither machine nor disk with the trainer.

`UpdateGroups` joins this process (rank 0) with all tensor-parallel ranks of each server. A group is made as SGLang
makes its own end (`sglang.srt.utils.common.init_custom_process_group`): beside the default group, of ranks that are in
no common world.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.parallel.groups import group_beside
from megatron_rl.rollout.sglang.event_loop import EventLoop
from megatron_rl.rollout.sglang.sglang_client import SGLangClient
from megatron_rl.rollout.sglang.weight_transfer.base import TRANSFERS
from megatron_rl.rollout.sglang.weight_transfer.full import FullTransfer

TIMEOUT = 600.0  # seconds


@dataclass(frozen=True, slots=True)
class _Joined:
    name: str
    group: dist.ProcessGroup
    store: dist.Store  # served by this process: it must live as long as the group


class UpdateGroups:
    """One group for each server.

    Args:
        tp: tensor-parallel ranks of a server.
        address: of this machine, as servers reach it; None = that of the route to them.
        timeout: seconds to join, and of one broadcast.
    """

    def __init__(self, loop: EventLoop, tp: int, address: str | None, timeout: float) -> None:
        self._loop, self._tp, self._address, self._timeout = loop, tp, address, timeout
        self._joined: dict[str, _Joined] = {}

    def join(self, clients: Sequence[SGLangClient], device: torch.device) -> None:
        """Join servers that are not yet; a failed update leaves its group (`broadcast`), so that it is made anew."""
        for client in clients:
            if client.url not in self._joined:
                self._joined[client.url] = self._join(client, device)

    def _join(self, client: SGLangClient, device: torch.device) -> _Joined:
        backend = "nccl" if device.type == "cuda" else "gloo"
        address, name = self._address or _own_address(client.url), f"megatron_rl-{uuid.uuid4().hex[:8]}"
        seconds, size = timedelta(seconds=self._timeout), 1 + self._tp
        # Bound by the store itself, port 0: nobody can take the port in between.
        store = dist.TCPStore(address, 0, size, is_master=True, wait_for_workers=False, timeout=seconds)
        body = {"master_address": address, "master_port": store.port, "rank_offset": 1, "world_size": size}
        body |= {"group_name": name, "backend": backend}
        theirs = self._loop.submit(client.init_weights_update_group(body, self._timeout))
        group = group_beside(name, backend, store, 0, size, self._timeout)
        theirs.result(self._timeout)
        return _Joined(name, group, store)

    def broadcast(self, clients: Sequence[SGLangClient], tensors: Mapping[str, Tensor]) -> None:
        """The same tensors to all servers.

        Raises:
            RuntimeError: a server failed.
        """
        body = {
            "names": list(tensors),
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
            "flush_cache": False,
        }
        for client in clients:
            joined = self._joined.pop(client.url)
            request = body | {"group_name": joined.name}
            theirs = self._loop.submit(client.update_weights_from_distributed(request, self._timeout))
            works = [dist.broadcast(t, group_src=0, group=joined.group, async_op=True) for t in tensors.values()]
            for work in works:
                work.wait(timedelta(seconds=self._timeout))
            theirs.result(self._timeout)
            self._joined[client.url] = joined


def _own_address(url: str) -> str:
    """This machine's address on the way to ``url``; nothing is sent."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        return str(probe.getsockname()[0])


@TRANSFERS.register("distributed")
class BroadcastTransfer(FullTransfer):
    """See the module.

    Args:
        address: of this machine, as the servers reach it; None = found out.
        timeout: seconds that a server may take to join, and one broadcast.
    """

    def __init__(self, address: str | None = None, timeout: float = TIMEOUT, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._groups = UpdateGroups(self.loop, len(self.ranks), address, timeout)

    def send_whole(self, tensors: Mapping[str, Tensor]) -> None:
        self._groups.join(self.clients, next(iter(tensors.values())).device)
        self._groups.broadcast(self.clients, tensors)
