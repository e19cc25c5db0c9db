"""Where a model without a family starts from, and what its first passes meet, on one rank."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from engines.fsdp2.steps import Tokenizer
from engines.fsdp2.tiny_models import tiny_model

from megatron_rl.algorithms import DPO
from megatron_rl.batch import Batch
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers import Actor, Critic, Reference


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    yield ParallelContext.create(ParallelSizes(), seed=1)
    ParallelContext.forget()


def test_a_critic_starts_from_the_folder_of_a_language_model(context, tmp_path):
    """Its output layer is a tensor that the critic does not have."""
    tiny_model("olmo2").save_pretrained(tmp_path)
    critic = Critic(str(tmp_path), context=context)
    assert type(critic.engine).__name__ == "FSDP2Engine"


def test_packed_padding_may_be_longer_than_a_model_has_positions(context):
    """Pairs stay together: the third goes alone, with 120 tokens of padding, and the model has 64 positions."""
    actor = Actor(tiny_model("gpt2"), Tokenizer(), context=context, config={"token_budget": 250})
    rows = [torch.arange(3 + i, 63 + i).tolist() for i in range(6)]
    pairs = Batch.from_sequences(rows, [[0] + [1] * 59 for _ in rows])
    metrics = DPO(actor, Reference(actor), beta=0.3).update()(pairs).metrics
    assert metrics["loss/total"] == pytest.approx(math.log(2), abs=1e-5)


def test_moments_are_saved_as_zeros_before_the_first_step(context):
    """As a policy that waits for its critic has them: what is loaded into asks for all of them."""
    actor = Actor(tiny_model("olmo2"), Tokenizer(), context=context)
    state = actor.engine.state()
    assert state["optimizer"].keys() == actor.engine.state(loading=True)["optimizer"].keys() != set()
    assert all(not moment.to_local().any() for moment in state["optimizer"].values())
