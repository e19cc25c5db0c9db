"""A mixture of experts under FSDP2, whose module fuses what SGLang fuses otherwise, pushed to a real server."""

from __future__ import annotations

import pytest
import torch
from integration.environment import sglang_python
from integration.test_sglang_routing import PROMPTS, write_model
from transformers import PreTrainedTokenizerFast

from megatron_rl.batch import Batch, Prompt
from megatron_rl.workers.actor import Actor
from megatron_rl.workers.loss import LossInputs, LossOutput

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def imitation(inputs: LossInputs) -> LossOutput:
    return LossOutput(-inputs.masked(inputs.logprobs).sum() / inputs.totals.tokens)


def test_a_server_holds_what_fsdp2_trains(tmp_path):
    folder = write_model(tmp_path)
    server = {"python": sglang_python(), "context_length": 512, "max_total_tokens": 8192}
    rollout = {"engine": "sglang", "max_running": 8, "options": {"server": server}}
    config = {"backend": "fsdp2", "rollout": rollout, "optimizer": {"learning_rate": 1e-3}}
    actor = Actor(folder, PreTrainedTokenizerFast.from_pretrained(folder), config=config)
    try:
        for version in (0, 1):
            samples = actor.generate([Prompt(ids, index=i) for i, ids in enumerate(PROMPTS)], max_tokens=8, n=2)
            assert {sample.policy_version for sample in samples} == {version}
            check = actor.verify_weights()
            assert check.compared == 1
            assert not check.faults
            rows = [[*sample.prompt.token_ids, *sample.response_ids] for sample in samples]
            batch = Batch.from_sequences(
                rows, [[0] * len(s.prompt.token_ids) + [1] * len(s.response_ids) for s in samples]
            )
            actor.logprobs().run(batch)
            drawn = torch.tensor([value for sample in samples for value in sample.rollout_logprobs])
            own = batch["old_logprobs"][batch["response_mask"].bool()]
            assert (drawn - own).abs().median() < 1e-3  # ties of routers aside
            actor.optimize(batch, imitation)
    finally:
        actor.close()
