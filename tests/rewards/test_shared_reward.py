"""A service is asked once for each replica of the model: its ranks must agree, and it must not be asked by each."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import pytest
from forked import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
from contract_server import ContractServer


@pytest.mark.distributed
def test_ranks_of_one_replica_share_one_answer_of_a_moody_server() -> None:
    server = ContractServer()
    calls = count()
    server.plain["/moods"] = lambda body: {"moods": [100 * next(calls) + i for i in range(len(body["all"]))]}
    try:
        program = Path(__file__).with_name("shared_program.py")
        assert "both ranks have the same rewards" in run_ranks(program, 2, server.url, timeout=240)
    finally:
        server.close()
    assert sum("all" in body for body in server.bodies) == 1
