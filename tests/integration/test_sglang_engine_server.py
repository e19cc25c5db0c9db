"""A real SGLang server under the engine: the contract of all engines, and pushes while it generates."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from integration.servers import MODEL, attached
from rollout.engine_contract import EngineContract, Loaded
from rollout.rollout_models import reference_logprobs

from megatron_rl.rollout import SamplingParams, SGLangEngine

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
LONG = SamplingParams(max_tokens=200, ignore_eos=True)


class TestARealServerKeepsTheContract(EngineContract):
    """See `EngineContract`."""


def spanning_request(engine: SGLangEngine, shards: dict[str, torch.Tensor]) -> Any:
    """One request of 200 tokens during which version 8 is pushed; how fast the machine is decides when."""
    for delay in (0.3, 0.1, 0.6, 1.5, 3.0, 0.0):
        engine.load_shards(shards, 7)
        answers: list[Any] = []
        asking = threading.Thread(target=lambda into=answers: into.append(engine.generate([[5, 9, 11]], LONG)))
        asking.start()
        time.sleep(delay)
        engine.load_shards({name: -shard if "lm_head" in name else shard for name, shard in shards.items()}, 8)
        asking.join(120)
        ((completion,),) = answers[0]
        if len(completion.policy_version_spans) > 1:
            return completion
    raise AssertionError(f"no push came while the request ran: {completion.policy_version_spans}")


@pytest.mark.parametrize("pause", ["retract", "in_place"])
def test_a_request_of_200_tokens_that_spans_a_push_reports_both_versions(loaded: Loaded, pause: str) -> None:
    with attached(loaded, pause=pause) as engine:
        completion = spanning_request(engine, loaded.shards)
    (old, first), (new, second) = completion.policy_version_spans
    assert (old, new, first + second) == (7, 8, 200)
    assert completion.policy_version == 8
    # Version 8 has the opposite logits: each part of the answer belongs to the weights it is said to come from.
    expected = reference_logprobs(MODEL, [5, 9, 11], completion.token_ids)
    error = (torch.tensor(completion.logprobs) - expected).abs()
    assert error[:first].max() < 1e-3
    assert error[first:].median() > 1.0
    loaded.engine.load_shards(loaded.shards, 7)
