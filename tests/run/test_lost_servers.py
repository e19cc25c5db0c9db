"""A server that dies while it answers and comes back without weights gets them by another push; no sample is lost."""

from __future__ import annotations

import threading
from collections import deque

import pytest
import torch
from rollout.sglang_stand_in import StandIn
from small_run import write_run
from transformers import AutoTokenizer

from megatron_rl.batch import Batch, Prompt
from megatron_rl.workers import Actor

LIMIT = 1 << 14


def test_servers_that_die_of_every_request_end_the_run(tmp_path) -> None:
    write_run(tmp_path)
    model, servers = tmp_path / "model", [StandIn(faults=deque(["die"]))]
    ended = threading.Event()

    def succeed() -> None:
        while servers[-1].gone.wait(60) and not ended.is_set():
            servers.append(StandIn(port=servers[0].port, faults=deque(["die"])))

    coming = threading.Thread(target=succeed)
    coming.start()
    options = {"urls": [servers[0].url], "recovery_timeout": 60.0, "request_timeout": 30.0}
    rollout = {"engine": "sglang", "max_staging_bytes": LIMIT, "options": options}
    actor = Actor(str(model), AutoTokenizer.from_pretrained(model), config={"rollout": rollout})
    try:
        with pytest.raises(RuntimeError, match="servers end 3 times over before they have answered anything"):
            actor.sample(max_tokens=3).run(Batch(prompts=[Prompt([1, 5], index=0)]))
        assert 3 <= len(servers) <= 4
    finally:
        ended.set()
        actor.close()
        servers[-1].die()
        coming.join(60)


def test_weights_that_all_servers_lost_are_pushed_again_and_what_is_missing_is_asked_for(tmp_path) -> None:
    write_run(tmp_path)
    model, server, successor = tmp_path / "model", StandIn(die_after=20), list[StandIn]()
    coming = threading.Thread(target=lambda: server.gone.wait(60) and successor.append(StandIn(port=server.port)))
    coming.start()
    options = {"urls": [server.url], "concurrency": 8, "recovery_timeout": 60.0, "request_timeout": 30.0}
    rollout = {"engine": "sglang", "max_staging_bytes": LIMIT, "options": options}
    actor = Actor(str(model), AutoTokenizer.from_pretrained(model), config={"rollout": rollout})
    batch = Batch(prompts=[Prompt([1, 5, 3 + i % 13], index=i) for i in range(30)])
    actor.sample(n=2, max_tokens=3).run(batch)
    pushed = dict(server.weights)
    coming.join(60)
    assert [sample.response_ids for sample in batch.samples] == [[3 + i // 2 % 13] * 3 for i in range(60)]
    assert {sample.policy_version for sample in batch.samples} == {actor.rollouts.weights.trained_version}
    assert 20 <= len(server.answered) < 60
    assert len(successor[0].answered) < 60, "what was answered is not asked for again"
    assert successor[0].calls.count("/update_weights_from_tensor") > 3
    assert successor[0].weights.keys() == pushed.keys()
    assert all(torch.equal(successor[0].weights[name], tensor) for name, tensor in pushed.items())
    actor.close()
    successor[0].die()
