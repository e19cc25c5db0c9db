"""Jobs whose chunks Megatron-LM has put into `Float16Module`, on one rank: its upcast of the output changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from megatron_lm.job import JobArguments, build, float16, get_model, initialize, local_provider, transformer_config

import megatron_rl  # noqa: F401  (before megatron.core)
from megatron_rl.algorithms import GRPO, PPO
from megatron_rl.devices import current_platform
from megatron_rl.engines.megatron.model.hidden_states import hidden_states
from megatron_rl.engines.megatron.model.value_head import ValueHead
from megatron_rl.run.doctor.random_data import NumberTokenizer, sampled_batch
from megatron_rl.workers import Actor, Critic, Reference

from megatron.core import parallel_state  # isort: skip

HALF = {"bf16": {"bf16": True}, "fp16": {"fp16": True, "initial_loss_scale": 2.0**10}}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    if not dist.is_initialized():
        current_platform().init_process_group(timeout=60)
    parallel_state.destroy_model_parallel()  # of an earlier module in this process, if any
    initialize(JobArguments())
    yield
    parallel_state.destroy_model_parallel()


def bare_chunks(args: JobArguments) -> tuple[list, object]:
    torch.manual_seed(5)
    config = transformer_config(args)
    return get_model(args, config, local_provider(args, config)), config


@pytest.mark.parametrize("precision", HALF)
def test_hidden_states_keep_the_models_precision_and_their_gradient(precision):
    args = JobArguments(**HALF[precision])
    (bare,), config = bare_chunks(args)
    (wrapped,) = float16(args, config, [bare])
    ids = torch.arange(1, 13).view(2, 6)
    found = []
    for chunk in (wrapped, bare):  # the same parameters: Float16Module has rounded them in place
        with hidden_states(chunk):
            hidden = chunk(ids, torch.arange(6).expand(2, 6), None)
        bare.zero_grad()
        (hidden.float() ** 2).sum().backward()
        found.append((hidden, {name: p.grad for name, p in bare.named_parameters()}))
    (hidden, gradients), (expected, expected_gradients) = found
    assert hidden.dtype == args.params_dtype
    assert torch.equal(hidden, expected)
    assert gradients["decoder.layers.0.mlp.linear_fc1.weight"].abs().sum() > 0
    for name, gradient in gradients.items():
        assert (gradient is None) == (expected_gradients[name] is None)
        assert gradient is None or torch.equal(gradient, expected_gradients[name]), name
    # Out of the context nothing of it is left: logits, in fp32 as Float16Module gives them.
    assert wrapped(ids, torch.arange(6).expand(2, 6), None).dtype == torch.float32


@pytest.mark.parametrize("precision", HALF)
def test_a_job_in_half_precision_takes_steps(precision):
    job = build(JobArguments(use_distributed_optimizer=True, **HALF[precision]))
    actor = Actor(job.model, NumberTokenizer(), job.optimizer, parallel_state, scheduler=job.opt_param_scheduler)
    batch = sampled_batch(actor.context)
    before = actor.engine.tensors()["decoder.layers.0.mlp.linear_fc1.weight"].clone()
    GRPO(actor, Reference(actor), kl_coefficient=0.05, old_logprobs="recompute").update()(batch)
    assert batch.metrics["optimizer/gradient_norm"] > 0.1
    assert not torch.equal(before, actor.engine.tensors()["decoder.layers.0.mlp.linear_fc1.weight"])


def test_adapters_are_trained_in_a_wrapped_model():
    args = JobArguments(bf16=True)
    chunks, config = bare_chunks(args)
    actor = Actor(
        float16(args, config, chunks),
        NumberTokenizer(),
        parallel_state=parallel_state,
        config={"lora": {"rank": 2}},
        optimizer=None,
    )
    batch = sampled_batch(actor.context)
    GRPO(actor, Reference(actor), kl_coefficient=0.05).update()(batch)
    assert batch.metrics["optimizer/gradient_norm"] > 0.01
    assert all(adapter.b.abs().sum() > 0 for adapter in actor.engine.adapters.values())


def test_a_wrapped_critic_learns():
    args = JobArguments(bf16=True)
    chunks, config = bare_chunks(args)
    chunks[-1].output_layer = ValueHead(config, chunks[-1].pg_collection.tp)
    critic = Critic(float16(args, config, chunks), NumberTokenizer(), parallel_state=parallel_state)
    policy, policy_config = bare_chunks(args)
    actor = Actor(float16(args, policy_config, policy), NumberTokenizer(), parallel_state=parallel_state)
    batch = sampled_batch(actor.context)
    PPO(actor, critic=critic, kl_coefficient=0.0).update()(batch)
    assert chunks[-1].output_layer.weight.abs().sum() > 0
