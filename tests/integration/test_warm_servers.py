"""Servers that are forked live and die as servers do that are started."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.environment import sglang_python
from integration.servers import processes_of, wait_for
from transformers import LlamaConfig

from megatron_rl.rollout.sglang.server import ServerConfig, SGLangServer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SGLangServer]:
    LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    config = ServerConfig(python=sglang_python(), max_total_tokens=256, log_dir=str(tmp_path))
    made = SGLangServer(tmp_path, config, with_tokenizer=False)
    yield made
    made.close()


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", ["close", "kill the guard", "kill the stub", "kill the server", "kill the scheduler"])
def test_no_process_of_a_server_is_left_however_it_ends(server: SGLangServer, end: str) -> None:
    server.start()
    assert server._guard is not None
    stub, leader, scheduler, *_ = processes = processes_of(server)
    assert len(processes) == 4
    victims = {"guard": server._guard.pid, "stub": stub, "server": leader, "scheduler": scheduler}
    if end == "close":
        server.close()
    else:
        os.kill(victims[end.split()[-1]], signal.SIGKILL)
    wait_for(lambda: not any(map(lives, processes)), 20.0)
    wait_for(lambda: not server.is_running, 20.0)


def test_a_server_that_cannot_start_says_why(server: SGLangServer) -> None:
    server.config.args["no-such-option"] = True
    with pytest.raises(RuntimeError, match=r"(?s)ended while it started.*unrecognized arguments: --no-such-option"):
        server.start()
