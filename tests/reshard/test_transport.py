"""Transports inside one process; `exchange_program.py` covers real processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megatron_rl.reshard import LocalTransport, MemoryHub, TransportError
from megatron_rl.reshard.transport import _as_bytes
from megatron_rl.reshard.transport_node import read_memory


def test_memory_transports_match_messages_in_the_order_of_posting() -> None:
    hub = MemoryHub(timeout=1)
    first, second, out = torch.tensor([1.0, 2.0]), torch.tensor([3.0]), (torch.zeros(2), torch.zeros(1))
    sends = [hub.transport(0).exchange(1, value, None) for value in (first, second)]
    for value in out:
        hub.transport(1).exchange(0, None, value).wait()
    for pending in sends:
        pending.wait()
    assert out[0].tolist() == [1.0, 2.0]
    assert out[1].tolist() == [3.0]


def test_a_message_nobody_takes_is_an_error_that_names_the_peer() -> None:
    pending = MemoryHub(timeout=0.05).transport(0).exchange(7, torch.ones(1), None)
    with pytest.raises(TransportError, match="rank 7 did not take"):
        pending.wait()


def test_a_local_transport_has_no_peers() -> None:
    with pytest.raises(TransportError, match="rank 1, but its transport is local only"):
        LocalTransport().exchange(1, torch.ones(1), None)


def test_memory_that_is_not_contiguous_is_refused_rather_than_sent_wrong() -> None:
    with pytest.raises(RuntimeError, match="view"):
        _as_bytes(torch.zeros(4, 6)[:, :3])
    assert _as_bytes(torch.zeros(4, 6, dtype=torch.bfloat16)).shape == (48,)


@pytest.mark.skipif(sys.platform != "linux", reason="process_vm_readv(2)")
def test_memory_is_read_whole_or_not_at_all() -> None:
    source, into = torch.arange(1000), torch.zeros(1000, dtype=torch.int64)
    assert read_memory(os.getpid(), source.data_ptr(), into)
    assert torch.equal(into, source)
    assert not read_memory(os.getpid(), 8, into)  # no such address
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert not read_memory(gone.pid, source.data_ptr(), into)
