"""The warning about trainer and engine names its cause, measured on real servers."""

from __future__ import annotations

import asyncio
import logging

import pytest
import torch
from algorithms.measured_mismatch import measure
from algorithms.stand_ins import StandInWorker
from integration.servers import MODEL
from rollout.engine_contract import Loaded
from rollout.rollout_models import Cutter, random_model, reference_logprobs
from transformers import PreTrainedModel

from megatron_rl.algorithms import GRPO
from megatron_rl.batch import Batch
from megatron_rl.rollout import RolloutEngine, SamplingParams, WeightCheck
from megatron_rl.rollout.sglang.sglang_client import SGLangClient
from megatron_rl.rollout.sglang.weight_transfer.wire import named_tensors

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
SPOILED = "model.layers.1.mlp.down_proj.weight"


class Trainer(StandInWorker):
    """What the algorithm asks of an actor whose engine is real."""

    def __init__(self, engine: RolloutEngine) -> None:
        super().__init__()
        self.engine, self.num_checks = engine, 0

    def verify_weights(self) -> WeightCheck:
        self.num_checks += 1
        return self.engine.verify_weights()


def gap(engine: RolloutEngine, trained: PreTrainedModel, version: int) -> dict[str, float]:
    """The metrics of a step whose trainer holds ``trained`` as ``version``; half of the prompts go to each server."""
    prompts = [[5, 3 + i] for i in range(40)]
    answers = engine.generate(prompts, SamplingParams(max_tokens=16, ignore_eos=True))
    differences, stale = [], []
    for prompt, (completion,) in zip(prompts, answers, strict=True):
        expected = reference_logprobs(trained, prompt, completion.token_ids)
        differences.append((expected - torch.tensor(completion.logprobs)).tolist())
        stale.append([float(version - completion.policy_version)] * len(completion.token_ids))
    return measure(differences, stale)


def overwrite(url: str, name: str, tensor: torch.Tensor) -> None:
    """As somebody else would who is attached to the server; the name of its weights stays.

    Paused, since a server may still count a request whose answer has come, and does not flush its cache then.
    """

    async def write() -> None:
        client = SGLangClient(url)
        await client.pause("retract")
        await client.begin_weight_update()
        await client.update_weights_from_tensor([named_tensors({name: tensor})], load_format="direct", flush_cache=True)
        await client.end_weight_update()
        await client.resume()
        await client.close()

    asyncio.run(write())


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of the algorithm; the engine has its own, as of an attempt that a busy machine made late."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("megatron_rl.algorithms.")]


def test_weights_that_were_changed_behind_our_back_are_named_with_their_server(
    loaded: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    engine, trainer = loaded.engine, Trainer(loaded.engine)
    engine.load_shards(loaded.shards, 20)
    algorithm = GRPO(trainer, kl_coefficient=0.0)
    healthy, victim = engine.urls  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        algorithm.finish_step(Batch(metrics=gap(engine, MODEL, 20)))
        assert not warnings_of(caplog)
        assert trainer.num_checks == 0, "a look at all weights is for warnings only"
        overwrite(victim, SPOILED, torch.randn_like(loaded.shards[SPOILED]))
        metrics = gap(engine, MODEL, 20)
        for _ in range(3):
            algorithm.finish_step(Batch(metrics=dict(metrics)))
    (message,) = warnings_of(caplog)
    print(message)
    assert f"wrong or mixed weights: {victim} no longer holds what was pushed: {SPOILED} on rank 0" in message
    assert healthy not in message
    assert trainer.num_checks == 1
    engine.load_shards(loaded.shards, 21)
    assert engine.verify_weights() == WeightCheck(2)
    assert gap(engine, MODEL, 21)["mismatch/kl"] < 1e-4


def test_a_gap_that_comes_from_older_weights_is_called_staleness(
    loaded: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    newer = random_model("llama_long", seed=1)
    algorithm = GRPO(Trainer(loaded.engine), kl_coefficient=0.0)
    loaded.engine.load_shards(loaded.shards, 22)
    with caplog.at_level(logging.WARNING):
        algorithm.finish_step(Batch(metrics=gap(loaded.engine, newer, 23)))
        loaded.engine.load_shards(Cutter(loaded.engine.architecture, newer.state_dict()).cut(), 23)  # type: ignore[attr-defined]
        algorithm.finish_step(Batch(metrics=gap(loaded.engine, newer, 23)))
    (message,) = warnings_of(caplog)
    print(message)
    assert "perhaps staleness: 100% of the tokens" in message
    loaded.engine.load_shards(loaded.shards, 24)
