"""Ranks as threads of one process, joined by `MemoryTransport`: whole jobs in memory, without torchrun."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from megatron_rl.reshard import MemoryHub, Transport, TransportError

T = TypeVar("T")


def on_ranks(world: int, work: Callable[[int, Transport], T], timeout: float = 20.0) -> list[T | Exception]:
    """What ``work(rank, transport)`` returned or raised on each rank."""
    hub = MemoryHub(timeout)

    def run(rank: int) -> T | Exception:
        try:
            return work(rank, hub.transport(rank))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def all_well(results: list[T | Exception]) -> list[T]:
    """The results, after raising an exception among them: rather a cause than a rank that waited in vain."""
    failed = [result for result in results if isinstance(result, Exception)]
    for error in sorted(failed, key=lambda error: isinstance(error, TransportError)):
        raise error
    return results  # type: ignore[return-value]
