"""Ranks of one machine read one another's memory: the kernel copies once, where a socket takes two copies and a thread
at each end.

A sender offers the address of its buffer; the receiver reads it (process_vm_readv(2)) and says so. Where the kernel
does not let it read, it says that, and the bytes come as an ordinary message: no setting, and nothing to go wrong but
speed. Offers and answers are small messages of the process group, which also bounds the waits.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.collectives.nodes import identity

MIN_BYTES = 1 << 17  # of a buffer worth an offer and its answer
OFFER, ANSWER, REFUSED = 1, 2, 3  # tags: what is offered, whether it was read, what could not be read
PR_SET_PTRACER = 0x59616D61  # prctl(2): who may read this process where Yama's ptrace_scope is 1


class Neighbours:
    """Which ranks have memory that this one may try to read. Every rank of a plan makes one, before its first exchange.

    Args:
        store: of all ranks, usually that of the default process group.
        rank: this one.
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store, self._own = store, _memory_key()
        self._near: dict[int, bool] = {}
        store.set(f"megatron_rl/memory/{rank}", self._own)

    def near(self, peer: int) -> bool:
        """Equal at both ends. Waits for the peer to make its `Neighbours`."""
        if peer not in self._near:
            self._near[peer] = bool(self._own) and self._store.get(f"megatron_rl/memory/{peer}").decode() == self._own
        return self._near[peer]


class MemoryRead:
    """The exchange of large buffers with a rank of this machine, either of them None."""

    def __init__(self, peer: int, group: dist.ProcessGroup | None, send: Tensor | None, receive: Tensor | None) -> None:
        self._peer, self._group, self._send, self._receive = peer, group, send, receive
        self._offered, self._answered = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        if send is not None:
            own = torch.tensor([os.getpid(), send.data_ptr()])
            self._offer = _message(dist.isend, own, peer, group, OFFER), own
            self._answer = _message(dist.irecv, self._answered, peer, group, ANSWER)
        if receive is not None:
            self._offers = _message(dist.irecv, self._offered, peer, group, OFFER)

    def works(self, wait: Callable[[dist.Work], None]) -> list[dist.Work]:
        """Read, answer, and wait by ``wait()`` for the peer's answer; returns what else must be waited for."""
        works = []
        if self._receive is not None:
            wait(self._offers)
            process, address = self._offered.tolist()
            done = torch.tensor([int(read_memory(process, address, self._receive))])
            wait(_message(dist.isend, done, self._peer, self._group, ANSWER))
            if not done:
                works.append(_message(dist.irecv, self._receive, self._peer, self._group, REFUSED))
        if self._send is not None:
            wait(self._answer)
            wait(self._offer[0])
            if not self._answered:
                works.append(_message(dist.isend, self._send, self._peer, self._group, REFUSED))
        return works


def _message(operation: object, tensor: Tensor, peer: int, group: dist.ProcessGroup | None, tag: int) -> dist.Work:
    return dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer, group, tag)])[0]  # type: ignore[arg-type]


class _IOVec(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library, where it has the call (Linux)."""
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "process_vm_readv"):
        return None
    library.process_vm_readv.restype = ctypes.c_ssize_t
    span = ctypes.POINTER(_IOVec)
    library.process_vm_readv.argtypes = [ctypes.c_int, span, ctypes.c_ulong, span, ctypes.c_ulong, ctypes.c_ulong]
    return library


def read_memory(process: int, address: int, into: Tensor) -> bool:
    """Fill contiguous ``into`` from another process' memory; False where the kernel does not allow it."""
    library, done = _libc(), 0
    while library is not None and done < into.nbytes:
        here, there = (_IOVec(start + done, into.nbytes - done) for start in (into.data_ptr(), address))
        count = library.process_vm_readv(process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if count <= 0:
            return False
        done += count
    return library is not None


def _memory_key() -> str:
    """Equal for processes that may read one another; empty where this one can read none."""
    word, library = torch.zeros(1, dtype=torch.int64), _libc()
    if library is None or not read_memory(os.getpid(), word.data_ptr(), torch.empty_like(word)):  # as under seccomp
        return ""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text().strip() == "1":  # ranks descend from the same launcher
        library.prctl(PR_SET_PTRACER, ctypes.c_ulong(os.getppid()), 0, 0, 0)
    return f"{identity()} {os.getuid()}"
