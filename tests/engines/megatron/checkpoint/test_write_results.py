"""The queue through which checkpoint writers report: Megatron-Core keeps one for all saves of a process."""

from __future__ import annotations

import os
import queue

import pytest

from megatron_rl.engines.megatron.checkpoint.write_results import WriteResults


def test_every_result_is_given_out_once_and_in_order():
    results = WriteResults()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    for save in range(3):
        results.put({"save": save})
        assert results.get_nowait() == {"save": save}
        with pytest.raises(queue.Empty):
            results.get_nowait()
    results.put("a")
    results.put("b" * 100_000)
    assert [results.get_nowait(), results.get_nowait()] == ["a", "b" * 100_000]


def test_what_a_fork_puts_is_found_by_its_parent():
    results = WriteResults()
    for save in range(2):
        child = os.fork()
        if child == 0:
            results.put(save)
            os._exit(0)
        os.waitpid(child, 0)
        assert results.get_nowait() == save
