"""A model that nobody refers to any more is freed after it was trained, and its groups with it."""

from __future__ import annotations

import gc
import os
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rl.batch import Batch
from megatron_rl.engines.build import build_engine
from megatron_rl.engines.engine_config import EngineConfig, OptimizerConfig
from megatron_rl.engines.micro_batches import plan_micro_batches
from megatron_rl.models.architecture import Architecture, Experts
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.run.doctor.random_data import PLAIN, write_random_model
from megatron_rl.workers.outputs import logprob_output

EXPERTS = replace(PLAIN, family="qwen3_moe", qk_norm=True, experts=Experts(4, 2, 32, dense_layers=(0,)))


def train(folder: Path) -> weakref.ref[object]:
    """One step; returns what knows whether the model still lives."""
    context = ParallelContext.create(ParallelSizes(), seed=1)
    config = EngineConfig(optimizer=OptimizerConfig(learning_rate=1e-3), token_budget=64)
    engine = build_engine(str(folder), context, config, name="model")
    batch = Batch.from_sequences([[3, 4, 5, 6]], [[0, 1, 1, 1]])
    predicted = logprob_output(engine, batch, temperature=1.0)

    def output(micro_batch, hidden):
        loss = -predicted(micro_batch, hidden).sum()
        return loss, float(loss.detach())

    engine.forward_backward(batch, plan_micro_batches(batch, engine), output)
    engine.step()
    return weakref.ref(engine.chunks[0])


@pytest.mark.parametrize("architecture", [PLAIN, EXPERTS], ids=["dense", "experts"])
def test_a_trained_model_is_freed_with_its_groups(architecture: Architecture, tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", architecture, seed=1)
    threads = []
    for _ in range(3):
        model = train(tmp_path / "model")
        ParallelContext.forget()
        gc.collect()
        assert model() is None
        threads.append(len(os.listdir("/proc/self/task")))
    assert threads[2] == threads[1]
