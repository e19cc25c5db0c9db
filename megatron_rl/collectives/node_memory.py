"""`NodeMemory`: POSIX shared memory between the ranks of one node, and their barrier.

    slots of rank 0 | slots of rank 1 | ... | results     a rank writes its input to its slots; results are the node's

Slots and results are rings: pieces of a message take turns. Before them there is a cache line for each rank: the
barrier's count, a word for the other ranks (`say`, `heard`), and its process id. The file is unlinked as soon as all
ranks have mapped it: nothing is left behind when one is killed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.collectives import futex

LINE = 64  # bytes of a cache line: a rank's words never share one with another's
SHARED = Path("/dev/shm")
CHECK = 0.2  # seconds between two checks that the late ranks still run


class CollectiveError(RuntimeError):
    """A collective failed on all ranks: no path is left, or a rank is gone. Its result must not be used."""


class NodeMemory:
    """Shared memory of ``size`` ranks.

    Args:
        store: of these ranks alone (a prefix).
        rank: this rank's index in the node.
        piece_bytes: of each slot and each result.
        slots: of each rank.
        results: of the node.
        timeout: seconds that a barrier waits for the slowest rank.

    Raises:
        CollectiveError: the ranks see different memory, as containers with a /dev/shm of their own do.
    """

    def __init__(
        self, store: dist.Store, rank: int, size: int, piece_bytes: int, slots: int, results: int, timeout: float
    ) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self._epoch = 0
        piece_bytes = -(-piece_bytes // LINE) * LINE
        at, self._num_slots = LINE * size, slots
        self._map = _shared_map(store, rank, size, at + (slots * size + results) * piece_bytes, timeout)
        self._words = memoryview(self._map)[:at].cast("q")
        self._words[rank * LINE // 8 + 2] = os.getpid()
        self.everything = torch.frombuffer(self._map, dtype=torch.uint8)
        self._pieces = self.everything[at:].split(piece_bytes)

    def slot(self, index: int, turn: int, dtype: torch.dtype) -> Tensor:
        """Where the node's rank ``index`` writes its ``turn``-th piece, flat."""
        return self._pieces[index * self._num_slots + turn % self._num_slots].view(dtype)

    def result(self, turn: int, dtype: torch.dtype) -> Tensor:
        """The node's result of the ``turn``-th piece, flat."""
        first = self.size * self._num_slots
        return self._pieces[first + turn % (len(self._pieces) - first)].view(dtype)

    def say(self, word: int) -> None:
        """Write this rank's word; the others see it after the next barrier."""
        self._words[self.rank * LINE // 8 + 1] = word

    def heard(self) -> list[int]:
        """The word of every rank of the node."""
        return [self._words[index * LINE // 8 + 1] for index in range(self.size)]

    def barrier(self) -> None:
        """Return once every rank of the node has come here; what they wrote before is then visible.

        Each count is an aligned word that one rank writes. Giving up and taking back the interpreter's lock
        (`sleep(0)`) is a release and an acquire of a mutex, which order the data before the count, on ARM as well.

        Raises:
            CollectiveError: a rank did not come in time.
        """
        self._epoch += 1
        time.sleep(0)
        self._words[self.rank * LINE // 8] = self._epoch
        futex.wake(self._address(self.rank))
        started = time.monotonic()
        for index in range(self.size):
            while (seen := self._words[index * LINE // 8]) < self._epoch:
                futex.wait(self._address(index), seen, CHECK)
                if (waited := time.monotonic() - started) > CHECK:
                    self._require_alive(waited)

    def _address(self, index: int) -> int:
        return self.everything.data_ptr() + index * LINE

    def _require_alive(self, waited: float) -> None:
        late = [index for index in range(self.size) if self._words[index * LINE // 8] < self._epoch]
        for index in late:
            pid = self._words[index * LINE // 8 + 2]
            if pid and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
                raise CollectiveError(f"rank {index} of this node (process {pid}) has ended during a collective")
        if late and waited > self.timeout:
            raise CollectiveError(
                f"rank {late[0]} of this node did not take part in a collective within {self.timeout:g} s"
            )


def _shared_map(store: dist.Store, rank: int, size: int, total: int, timeout: float) -> mmap.mmap:
    """Rank 0 creates the file and publishes its name; every rank maps it; then it is unlinked."""
    if rank == 0:
        descriptor, name = tempfile.mkstemp(prefix="megatron_rl_", dir=SHARED if SHARED.is_dir() else None)
        os.posix_fallocate(descriptor, 0, total)  # a full /dev/shm is an error here, not a SIGBUS later
        store.set("memory", name)
    else:
        store.wait(["memory"], timedelta(seconds=timeout))
        name = store.get("memory").decode()
        descriptor = os.open(name, os.O_RDWR) if Path(name).exists() else -1
    try:
        found = mmap.mmap(descriptor, total) if descriptor >= 0 else None
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    store.set(f"mapped/{rank}", "yes" if found else "no")
    try:
        answers = [store.get(f"mapped/{other}").decode() for other in range(size)]
    finally:
        if rank == 0:
            os.unlink(name)
    if found is None or "no" in answers:
        raise CollectiveError(
            f"the ranks of this node do not see one {SHARED}: start their containers with a common /dev/shm, or set "
            "collectives.all_reduce=library"
        )
    return found
