"""Ranks of one start find one another, whatever an earlier start left in the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from megatron_rl.devices.rendezvous import store_of_this_start


def started(store: HashStore, size: int) -> list:
    with ThreadPoolExecutor(size) as pool:  # the other ranks come first, and see what the last start left
        ranks = [pool.submit(store_of_this_start, store, rank, size, 30.0) for rank in reversed(range(size))]
        return [rank.result(60) for rank in ranks]


def test_each_start_has_keys_of_its_own():
    store = HashStore()
    first = started(store, 3)
    first[0].set("address", "of a dead rank")
    assert {other.get("address") for other in first} == {b"of a dead rank"}
    second = started(store, 3)
    assert not any(other.check(["address"]) for other in second)
    second[2].set("address", "new")
    assert {other.get("address") for other in second} == {b"new"}


def test_a_rank_that_never_comes_is_an_error_in_time():
    with pytest.raises(TimeoutError, match="rank 1 waits for rank 0"):
        store_of_this_start(HashStore(), 1, 2, 0.1)
    with pytest.raises(TimeoutError, match="rank 0 waits for 1 other"):
        store_of_this_start(HashStore(), 0, 2, 0.1)
