"""The optimizer of a job, on one rank: a torch one gives Megatron's own steps, a wrong one is refused by name, fp16's
loss scale falls and steps are skipped, and what is made here follows the chunks' own wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron_lm.job import (
    Job,
    JobArguments,
    build,
    float16,
    get_model,
    initialize,
    local_provider,
    optimizer_of,
    transformer_config,
    wrap,
)

import megatron_rl  # noqa: F401  (before megatron.core)
from megatron_rl.algorithms import GRPO
from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.run.doctor.random_data import PLAIN, NumberTokenizer, sampled_batch, write_random_model
from megatron_rl.workers import Actor

from megatron.core import parallel_state  # isort: skip
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # isort: skip
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer  # isort: skip

CLIP = 0.5
SMALL = JobArguments(num_layers=1, clip_grad=CLIP)
ADAM = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
ROUNDING = {"fp32": 1e-6, "bf16": 2.0**-7, "fp16": 2.0**-10}
PRECISIONS = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True, "initial_loss_scale": 2.0**16}}


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    if not dist.is_initialized():
        current_platform().init_process_group(timeout=60)
    parallel_state.destroy_model_parallel()  # of an earlier module in this process, if any
    initialize(SMALL)
    yield
    parallel_state.destroy_model_parallel()


def chunks_of(args: JobArguments = SMALL, seed: int = 5) -> list[torch.nn.Module]:
    torch.manual_seed(seed)
    config = transformer_config(args)
    return float16(args, config, get_model(args, config, local_provider(args, config)))


def wrapped_chunks(args: JobArguments = SMALL, seed: int = 5) -> list[torch.nn.Module]:
    return wrap(args, transformer_config(args), chunks_of(args, seed))


def parameters(chunks: list[torch.nn.Module]) -> list[torch.nn.Parameter]:
    return [parameter for chunk in chunks for parameter in chunk.parameters()]


def actor_of(chunks: list[torch.nn.Module], optimizer: Any = None, **settings: Any) -> Actor:
    return Actor(chunks, NumberTokenizer(), optimizer, parallel_state, **settings)


def steps(actor: Actor, count: int = 2) -> Batch:
    algorithm = GRPO(actor)
    for _ in range(count):
        batch = sampled_batch(actor.context)
        algorithm.update()(batch)
    return batch


def final(actor: Actor) -> torch.Tensor:
    return torch.cat([tensor.flatten().float() for tensor in actor.engine.tensors().values()])


# --- a torch optimizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_torch_optimizer_takes_the_steps_of_megatrons_own(precision):
    """The same update rule, clipped alike, whether the chunks came bare or wrapped. Norms add up in another order, so a
    last bit may differ; in half precision that is a rounding of the weight. Where a gradient is as small as Adam's
    epsilon that bit counts for more: 1e-6 is a ten-thousandth of a step."""
    args = replace(SMALL, **PRECISIONS[precision])
    made = {}
    for kind in ("own", "bare", "wrapped"):
        if kind == "own":
            job = job_without_decay(args)
            actor = actor_of(job.model, job.optimizer)
        else:
            chunks = chunks_of(args) if kind == "bare" else wrapped_chunks(args)
            clipped = Actor.Config(optimizer={"clip_gradient": CLIP})
            actor = actor_of(chunks, torch.optim.Adam(parameters(chunks), **ADAM), config=clipped)
        batch = steps(actor)
        made[kind] = (final(actor), batch.metrics["optimizer/gradient_norm"], batch.metrics["optimizer/learning_rate"])
    assert made["own"][1] > CLIP  # so that clipping has done something
    for kind in ("bare", "wrapped"):
        torch.testing.assert_close(made[kind][0], made["own"][0], rtol=ROUNDING[precision], atol=1e-6)
        assert made[kind][1:] == pytest.approx(made["own"][1:], rel=10 * ROUNDING[precision])


def job_without_decay(args: JobArguments) -> Job:
    torch.manual_seed(5)
    job = build(args)
    for group in job.optimizer.param_groups:
        group["weight_decay"], group["betas"], group["wd_mult"] = 0.0, ADAM["betas"], 0.0
    return Job(job.model, job.optimizer, job.opt_param_scheduler, job.config)


def test_groups_of_a_torch_optimizer_keep_their_own_learning_rates():
    chunks = chunks_of()
    named = [item for chunk in chunks for item in chunk.named_parameters()]
    frozen = [p for name, p in named if "embedding" in name]
    rest = [p for name, p in named if "embedding" not in name]
    actor = actor_of(chunks, torch.optim.SGD([{"params": frozen, "lr": 0.0}, {"params": rest}], lr=0.1))
    before = {name: tensor.clone() for name, tensor in actor.engine.tensors().items()}
    steps(actor)
    for name, tensor in actor.engine.tensors().items():
        assert torch.equal(tensor, before[name]) == ("embedding" in name), name


# --- refusals --------------------------------------------------------------------------------------------------------


def scheduler_as_optimizer() -> tuple:
    job = build(SMALL)
    return job.model, job.opt_param_scheduler


def torch_scheduler_as_scheduler() -> tuple:
    chunks = chunks_of()
    optimizer = torch.optim.Adam(parameters(chunks))
    return chunks, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)


def scheduler_of_another() -> tuple:
    job = build(SMALL)
    return job.model, job.optimizer, build(SMALL).opt_param_scheduler


def scheduler_alone() -> tuple:
    return wrapped_chunks(), None, build(SMALL).opt_param_scheduler


def of_another_copy() -> tuple:
    return wrapped_chunks(), optimizer_of(SMALL, wrapped_chunks())


def sharded_of_another_copy() -> tuple:
    args = replace(SMALL, use_distributed_optimizer=True, bf16=True)
    return wrapped_chunks(args), optimizer_of(args, wrapped_chunks(args))


def torch_of_another_copy() -> tuple:
    return wrapped_chunks(), torch.optim.Adam(parameters(chunks_of()))


def of_a_part() -> tuple:
    chunks = chunks_of()
    return chunks, torch.optim.Adam(parameters(chunks)[1:])


def torch_over_shards() -> tuple:
    chunks = wrapped_chunks(replace(SMALL, use_distributed_optimizer=True))
    return chunks, torch.optim.Adam(parameters(chunks))


def whole_over_shards() -> tuple:
    chunks = wrapped_chunks(replace(SMALL, use_distributed_optimizer=True))
    return chunks, optimizer_of(SMALL, chunks)


def without_its_precision() -> tuple:
    chunks = wrapped_chunks(replace(SMALL, bf16=True))
    return chunks, optimizer_of(SMALL, chunks)


def without_a_loss_scale() -> tuple:
    chunks = wrapped_chunks(replace(SMALL, fp16=True))
    return chunks, optimizer_of(replace(SMALL, bf16=True), chunks)


def on_bare_chunks() -> tuple:
    job = build(SMALL)
    return [chunk.module for chunk in job.model], job.optimizer


def with_a_closure() -> tuple:
    chunks = chunks_of()
    return chunks, torch.optim.LBFGS(parameters(chunks))


def experts_apart() -> tuple:
    chunks = chunks_of(replace(SMALL, num_experts=2, qk_layernorm=True))
    for name, parameter in chunks[0].named_parameters():
        parameter.allreduce = ".experts." not in name
    return chunks, torch.optim.Adam(parameters(chunks))


WRONG = {
    scheduler_as_optimizer: "optimizer is a OptimizerParamScheduler, expected Megatron-Core's .* scheduler=",
    torch_scheduler_as_scheduler: "scheduler is a StepLR, expected Megatron-Core's OptimizerParamScheduler or None",
    scheduler_of_another: "the scheduler drives another ChainedOptimizer than the one that was given",
    scheduler_alone: "a scheduler was given without the optimizer that it drives",
    of_another_copy: r"the optimizer \(ChainedOptimizer\) trains 9 of its 9 parameters outside the model chunks",
    sharded_of_another_copy: "trains 9 of its 9 parameters outside the model chunks",
    torch_of_another_copy: r"the optimizer \(Adam\) trains 9 of its 9 parameters outside the model chunks",
    of_a_part: r"does not train 1 parameters of the model chunks, for example embedding.word_embeddings.weight",
    torch_over_shards: r"use_distributed_optimizer=True\): pass get_megatron_optimizer",
    whole_over_shards: "optimizer is a FP32Optimizer, but .* has use_distributed_optimizer=True",
    without_its_precision: r"FP32Optimizer made for OptimizerConfig\(bf16=False, fp16=False\).*in bfloat16",
    without_a_loss_scale: r"made for OptimizerConfig\(bf16=True, fp16=False\).*in float16",
    on_bare_chunks: "not wrapped in Megatron's DistributedDataParallel",
    with_a_closure: "optimizer is an LBFGS, which evaluates the loss several times a step",
    experts_apart: "experts' gradients are summed over other ranks",
}


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_what_cannot_train_these_chunks_is_refused_by_name(make):
    chunks, optimizer, *scheduler = make()
    with pytest.raises(ConfigError, match=WRONG[make]) as caught:
        actor_of(chunks, optimizer, scheduler=scheduler[0] if scheduler else None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [[], {}, "adam", 3], ids=["list", "dict", "str", "int"])
def test_an_object_that_is_no_optimizer_is_refused(given):
    with pytest.raises(ConfigError, match=f"optimizer is a {type(given).__name__}, expected Megatron-Core's"):
        actor_of(chunks_of(), given)


def test_chunks_that_are_wrapped_differently_are_refused():
    from megatron_rl.engines.megatron.adopted_optimizer import ddp_config_of

    plain, sharded = wrapped_chunks(), wrapped_chunks(replace(SMALL, use_distributed_optimizer=True))
    with pytest.raises(ConfigError, match="use_distributed_optimizer=False and True"):
        ddp_config_of([*plain, *sharded])
    with pytest.raises(ConfigError, match="1 of 2 model chunks are not wrapped"):
        ddp_config_of([*plain, *chunks_of()])


# --- made here, for chunks that are wrapped already ------------------------------------------------------------------

KINDS = {
    "fp32": (SMALL, FP32Optimizer),
    "bf16": (replace(SMALL, bf16=True), Float16OptimizerWithFloat16Params),
    "fp16": (replace(SMALL, fp16=True), Float16OptimizerWithFloat16Params),
    "sharded": (replace(SMALL, use_distributed_optimizer=True), DistributedOptimizer),
    "gathered_late": (
        replace(SMALL, bf16=True, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
        DistributedOptimizer,
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_the_optimizer_made_here_is_the_one_the_wrapper_was_made_for(case):
    args, kind = KINDS[case]
    actor = actor_of(wrapped_chunks(args), optimizer=None)
    (part,) = actor.engine.optimizer.chained_optimizers
    assert type(part) is kind
    assert part.config.overlap_param_gather == args.overlap_param_gather
    before = final(actor)
    assert steps(actor).metrics["optimizer/steps"] == 1.0
    actor.engine.sync_parameters()
    assert not torch.equal(final(actor), before)


def test_an_update_rule_that_cannot_be_sharded_is_refused_for_sharded_chunks():
    chunks = wrapped_chunks(replace(SMALL, use_distributed_optimizer=True))
    with pytest.raises(ConfigError, match="optimizer=sgd, but the model chunks are wrapped for Megatron's distributed"):
        actor_of(chunks, optimizer=None, config=Actor.Config(optimizer={"optimizer": "sgd"}))


# --- fp16 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
def test_an_overflow_is_skipped_and_counted(sharded):
    job = build(replace(SMALL, fp16=True, hysteresis=1, use_distributed_optimizer=sharded))  # begins at 2^32
    actor = actor_of(job.model, job.optimizer, scheduler=job.opt_param_scheduler)
    before, started = final(actor), job.opt_param_scheduler.num_steps
    batch = steps(actor, 1)
    assert batch.metrics["optimizer/skipped_steps"] == 1.0
    assert batch.metrics["optimizer/steps"] == 0.0
    assert batch.metrics["optimizer/loss_scale"] == 2.0**31
    assert "optimizer/gradient_norm" not in batch.metrics
    assert torch.equal(final(actor), before)
    assert job.opt_param_scheduler.num_steps == started
    assert actor.engine.num_steps == 0
    for _ in range(30):
        batch = steps(actor, 1)
        if batch.metrics["optimizer/steps"]:
            break
    assert batch.metrics["optimizer/gradient_norm"] > 0.1
    assert not torch.equal(final(actor), before)
    assert job.opt_param_scheduler.num_steps == started + 1


def test_a_gradient_that_no_scale_makes_finite_stops_the_run():
    job = build(replace(SMALL, fp16=True, initial_loss_scale=2.0, hysteresis=1))
    actor = actor_of(job.model, job.optimizer)
    bad = job.model[0].module.module.decoder.layers[0].mlp.linear_fc2.weight
    bad.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))
    assert steps(actor, 1).metrics["optimizer/loss_scale"] == 1.0
    with pytest.raises(FloatingPointError, match=r"not finite, and the loss scale \(1\) cannot fall"):
        steps(actor, 1)


def test_a_model_that_is_built_here_in_fp16_has_a_loss_scale_too(tmp_path):
    folder = write_random_model(tmp_path / "model", PLAIN, 1)
    config = Actor.Config(dtype="float16", optimizer={"learning_rate": 1e-3})
    actor = Actor(str(folder), NumberTokenizer(), None, parallel_state, config=config)
    batch = steps(actor)
    assert batch.metrics["optimizer/loss_scale"] == 2.0**16
    assert batch.metrics["optimizer/skipped_steps"] == 0.0
    assert batch.metrics["optimizer/gradient_norm"] > 0.1


# --- hooks -----------------------------------------------------------------------------------------------------------


def test_a_configuration_shared_by_two_models_keeps_nothing_of_either():
    """Megatron-LM's own loop refuses one with a ``no_sync_func``; another model's loss scale would be a wrong one."""
    args = replace(SMALL, fp16=True, initial_loss_scale=2.0**8)
    config = transformer_config(args)
    actors = []
    for scale in (2.0**8, 2.0**12):
        torch.manual_seed(5)
        model = wrap(args, config, float16(args, config, get_model(args, config, local_provider(args, config))))
        actors.append(actor_of(model, optimizer_of(replace(args, initial_loss_scale=scale), model)))
    norms = [steps(actor, 1).metrics["optimizer/gradient_norm"] for actor in actors]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert config.no_sync_func is None
    assert config.grad_scale_func is None
    # What the job has left there itself for the first model does not serve the second.
    config.grad_scale_func = actors[0].engine.optimizer.scale_loss
    assert norms[1] / 4 < steps(actors[1], 1).metrics["optimizer/gradient_norm"] < 4 * norms[1]
    assert config.grad_scale_func == actors[0].engine.optimizer.scale_loss
