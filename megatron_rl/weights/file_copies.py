"""How files of weights are copied: some rows of a tensor at a time, by threads that write files of their own.

Reading, digesting and writing leave Python's lock, so that two threads keep two cores busy. A file system lets one
thread at a time write into a file: it is files that are divided, never one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from megatron_rl.devices.cores import usable_cores

BLOCK_BYTES = 4 << 20  # of a tensor that a thread holds while it is copied from file to file
MAX_THREADS = 4
T = TypeVar("T")


def row_blocks(start: int, stop: int, row_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """``[start, stop)`` in runs of rows of at most ``block_bytes``, or of one row where that is more."""
    step = max(block_bytes // max(row_bytes, 1), 1)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def num_threads(num_files: int, world_size: int) -> int:
    """For a process that writes ``num_files``; where there are several processes, they share the cores already."""
    return 1 if world_size > 1 else max(1, min(num_files, len(usable_cores()), MAX_THREADS))


def in_threads(count: int, work: Callable[[int, threading.Event], T]) -> list[T]:
    """``work(number, stop)`` in ``count`` threads at once, and what they return. Once one has failed, ``stop`` is set
    for the others, which then should end, and its error is raised."""
    stop = threading.Event()
    with ThreadPoolExecutor(count, "copy files") as pool:
        running = [pool.submit(work, number, stop) for number in range(count)]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    return [one.result() for one in running]
