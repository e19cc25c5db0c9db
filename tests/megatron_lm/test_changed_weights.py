"""Weights that something else than `Actor.optimize` has changed, on one rank: noticed, pushed, and trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron_lm.job import Job, JobArguments, build, float16, get_model, initialize, local_provider, transformer_config
from megatron_lm.served_version import is_current

import megatron_rl  # noqa: F401  (before megatron.core)
from megatron_rl.algorithms import GRPO
from megatron_rl.batch import Batch, Prompt
from megatron_rl.devices import current_platform
from megatron_rl.rollout.base import WeightCheck
from megatron_rl.run.doctor.random_data import NumberTokenizer, fixed_batch, sampled_batch
from megatron_rl.workers import Actor, Reference

from megatron.core import parallel_state  # isort: skip
from megatron.core.distributed import finalize_model_grads  # isort: skip
from megatron.core.pipeline_parallel import get_forward_backward_func  # isort: skip

SMALL = JobArguments(num_layers=1, lr=0.1)
KINDS = {
    "fp32": SMALL,
    "bf16": replace(SMALL, bf16=True),
    "fp16": replace(SMALL, fp16=True, initial_loss_scale=2.0**8),
    "sharded": replace(SMALL, use_distributed_optimizer=True),
    "sharded_bf16": replace(SMALL, bf16=True, use_distributed_optimizer=True),
    "gathered_late": replace(
        SMALL, bf16=True, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    ),
}
ROUNDING = {torch.float32: 2e-4, torch.bfloat16: 0.15, torch.float16: 0.03}  # of a log-probability, engine to trainer


class Tokenizer(NumberTokenizer):
    """Sampling also wants texts."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return str(ids)


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    if not dist.is_initialized():
        current_platform().init_process_group(timeout=60)
    parallel_state.destroy_model_parallel()  # of an earlier module in this process, if any
    initialize(SMALL)
    yield
    parallel_state.destroy_model_parallel()


def job_and_actor(args: JobArguments) -> tuple[Job, Actor]:
    torch.manual_seed(5)
    job = build(args)
    sampling = {"max_tokens": 6, "n": 2}
    return job, Actor(job.model, Tokenizer(), job.optimizer, parallel_state, config={"sampling": sampling})


def sample(actor: Actor) -> Batch:
    batch = Batch(prompts=[Prompt([3, 4, 5], index=0), Prompt([7, 8], index=1)])
    actor.sample().run(batch)
    return batch


def gap(actor: Actor, batch: Batch) -> float:
    """Largest difference between the log-probabilities that the engine drew with and those of the training weights."""
    batch.sequences["rewards"] = torch.zeros(len(batch.samples))
    GRPO(actor).pack_stage().run(batch)
    actor.logprobs("now").run(batch)
    return float((batch["now"] - batch["rollout_logprobs"]).abs().max())


# --- what a job's own loop may do between two steps of ours -----------------------------------------------------------


def pretraining_step(job: Job, actor: Actor) -> None:
    """A step of a job's own language-model loop: its hooks, its schedule, its optimizer."""
    config = job.config
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, job.optimizer.scale_loss
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))

    def forward(iterator: Iterator, chunk: torch.nn.Module) -> tuple:
        loss = chunk(ids[:, :-1], torch.arange(8).expand(2, 8), None, labels=ids[:, 1:])
        return loss, lambda output: (output.float().mean(), {})

    for chunk in job.model:
        chunk.zero_grad_buffer()
    job.optimizer.zero_grad()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter([None]),
        model=job.model,
        num_microbatches=1,
        seq_length=8,
        micro_batch_size=2,
        forward_only=False,
    )
    assert job.optimizer.step()[0]
    config.finalize_model_grads_func = config.grad_scale_func = None


def load(job: Job, actor: Actor) -> None:
    """A checkpoint of other weights, into the model alone."""
    generator = torch.Generator().manual_seed(9)
    for chunk in job.model:
        state = {
            name: torch.randn(value.shape, generator=generator) * 0.1 if isinstance(value, torch.Tensor) else value
            for name, value in chunk.state_dict().items()
        }
        chunk.load_state_dict(state)


def write_behind_the_parameters(job: Job, actor: Actor) -> None:
    for parameter in job.model[0].parameters():
        parameter.data.add_(torch.full_like(parameter.data, 0.25))


def touch_one_element(job: Job, actor: Actor) -> None:
    next(job.model[0].parameters()).data[5, 3] += 8.0


CHANGES: list[Callable[[Job, Actor], None]] = [pretraining_step, load, write_behind_the_parameters, touch_one_element]


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_sample_is_of_the_new_weights_whatever_changed_them(kind):
    args = KINDS[kind]
    job, actor = job_and_actor(args)
    assert gap(actor, sample(actor)) < ROUNDING[args.params_dtype]
    for change in CHANGES:
        version = actor.policy_version
        assert is_current(actor)
        stale = sample(actor)
        assert actor.policy_version == version  # nothing changed, nothing was pushed
        change(job, actor)
        assert not is_current(actor), change.__name__
        (fault,) = actor.verify_weights().faults
        assert "were changed outside of Actor" in fault
        assert gap(actor, stale) > 2 * ROUNDING[args.params_dtype] or change is touch_one_element, change.__name__
        fresh = sample(actor)
        assert {one.policy_version for one in fresh.samples} == {version + 1}, change.__name__
        assert gap(actor, fresh) < ROUNDING[args.params_dtype], change.__name__
        assert actor.verify_weights() == WeightCheck(1)


@pytest.mark.parametrize("kind", ["bf16", "fp16", "sharded_bf16", "gathered_late"])
@pytest.mark.parametrize("told", [False, True], ids=["found", "told"])
def test_a_step_begins_at_the_weights_that_were_loaded(kind, told):
    """Not at the optimizer's fp32 copies of those before."""
    job, actor = job_and_actor(replace(KINDS[kind], lr=1e-4))
    sample(actor)
    load(job, actor)
    loaded = actor.engine.tensors()["decoder.layers.0.mlp.linear_fc1.weight"].clone()
    if told:
        actor.weights_changed()
    else:
        sample(actor)
    GRPO(actor).update()(sampled_batch(actor.context))
    actor.engine.sync_parameters()
    after = actor.engine.tensors()["decoder.layers.0.mlp.linear_fc1.weight"]
    assert not torch.equal(after, loaded)
    assert (after - loaded).abs().max() < 2e-3  # the learning rate, and a rounding


def test_fp32_copies_keep_what_a_step_gave_them():
    job, actor = job_and_actor(KINDS["bf16"])
    sample(actor)
    pretraining_step(job, actor)
    (part,) = job.optimizer.chained_optimizers
    before = [main.clone() for group in part.fp32_from_float16_groups for main in group]
    assert not torch.equal(before[0], before[0].bfloat16().float())  # finer than the weights
    sample(actor)
    actor.weights_changed()
    after = [main for group in part.fp32_from_float16_groups for main in group]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_weights_changed_makes_a_version():
    job, actor = job_and_actor(SMALL)
    sample(actor)
    assert actor.policy_version == 0
    load(job, actor)
    actor.weights_changed()
    assert actor.policy_version == 1
    assert not is_current(actor)
    assert not actor.verify_weights().faults  # known to be older, and whole
    assert {one.policy_version for one in sample(actor).samples} == {1}


def test_changed_adapters_are_pushed():
    config = transformer_config(SMALL)
    chunks = float16(SMALL, config, get_model(SMALL, config, local_provider(SMALL, config)))
    actor = Actor(
        chunks,
        Tokenizer(),
        parallel_state=parallel_state,
        config={"lora": {"rank": 2}, "sampling": {"max_tokens": 6}},
    )
    sample(actor)
    for adapter in actor.engine.adapters.values():
        adapter.b.data.add_(0.5)
    assert not is_current(actor)
    assert gap(actor, sample(actor)) < ROUNDING[torch.float32]
    assert actor.policy_version == 1


def test_an_engine_that_was_written_to_is_named():
    _, actor = job_and_actor(SMALL)
    assert actor.verify_weights() == WeightCheck()  # nothing was pushed yet
    sample(actor)
    assert actor.verify_weights() == WeightCheck(1)
    actor.rollouts.engine.targets()["model.layers.0.self_attn.o_proj.weight"][2, 3] += 1.0
    (fault,) = actor.verify_weights().faults
    assert "the engine on rank 0 no longer holds what was pushed: model.layers.0.self_attn.o_proj.weight" in fault
    GRPO(actor).update()(sampled_batch(actor.context))  # the trainer is ahead now, which is no fault; the engine's is
    assert len(actor.verify_weights().faults) == 1
    sample(actor)
    assert actor.verify_weights() == WeightCheck(1)


def test_a_frozen_copy_stays_what_it_was():
    job, actor = job_and_actor(SMALL)
    reference, batch = Reference(actor), fixed_batch(actor.context)
    reference.logprobs("before").run(batch)
    load(job, actor)
    sample(actor)
    reference.logprobs("after").run(batch)
    actor.logprobs("own").run(batch)
    assert torch.equal(batch["before"], batch["after"])
    assert not torch.allclose(batch["own"], batch["after"], atol=0.1)
