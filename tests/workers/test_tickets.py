"""Prompts are shared out by load: each part is taken once, and a slow replica takes fewer."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from torch.distributed import HashStore

from megatron_rl.workers.tickets import Tickets


def shared_out(count: int, size: int, seconds: list[float], batches: int = 1) -> list[list[list[int]]]:
    """For each replica (of two ranks) the parts that it took; replica i takes ``seconds[i]`` for each."""
    store, num_replicas = HashStore(), len(seconds)
    barrier = threading.Barrier(2 * num_replicas)

    def work(replica: int, leads: bool) -> list[list[int]]:
        tickets = Tickets(store, replica, num_replicas, leads)
        taken: list[list[int]] = []
        for _ in range(batches):
            barrier.wait()
            for part in tickets.parts(range(count), size):
                taken.append(part)
                time.sleep(seconds[replica])
            barrier.wait()
        return taken

    with ThreadPoolExecutor(2 * num_replicas) as pool:
        found = [[pool.submit(work, i, leads) for leads in (True, False)] for i in range(num_replicas)]
        results = [[future.result(timeout=60) for future in pair] for pair in found]
    assert all(leader == follower for leader, follower in results), "ranks of one replica take the same parts"
    return [leader for leader, _ in results]


def test_every_prompt_is_taken_once_and_the_fast_replica_takes_more() -> None:
    slow, fast = shared_out(20, 2, [0.3, 0.01])
    assert sorted(i for part in slow + fast for i in part) == list(range(20))
    assert len(slow) + len(fast) == 10
    assert len(fast) > 2 * len(slow) > 0


def test_what_fits_at_once_is_dealt_out() -> None:
    assert shared_out(5, 3, [0.2, 0.0]) == [[[0, 2, 4]], [[1, 3]]]


def test_the_next_batch_begins_anew() -> None:
    parts = shared_out(7, 2, [0.0, 0.0, 0.0], batches=3)
    assert sorted(i for replica in parts for part in replica for i in part) == sorted([*range(7)] * 3)
