"""Test program of several ranks: jobs built as Megatron-LM builds them, taken over and trained, on several layouts.

Each case takes three GRPO steps and a DPO step from the same weights. It prints the metrics of each step as a JSON
line, and leaves in FOLDER/<case> the exported model, beside it the logits that the job's own chunks compute.
Usage: job_program.py FOLDER CASE [CASE ...]; FOLDER/models holds "plain", "tied" and "experts".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import megatron_rl  # noqa: F401  (first: the CPU face)

from job import Job, JobArguments, build, float16, get_model, initialize, local_provider, transformer_config  # isort: skip
from served_version import is_current  # isort: skip
from megatron.core import parallel_state  # isort: skip
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_rl.algorithms import DPO, GRPO
from megatron_rl.batch import Batch, Prompt
from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.engines.megatron.model.layer_spec import layer_spec
from megatron_rl.engines.megatron.model.model_chunk import chunk_tensors, naming_of
from megatron_rl.models import megatron_layout
from megatron_rl.parallel import ParallelContext
from megatron_rl.run.doctor.random_data import NumberTokenizer, fixed_batch, sampled_batch
from megatron_rl.weights.hf_in import load_folder, read_architecture
from megatron_rl.workers import Actor, Reference

# Adam with a large epsilon is nearly plain descent with momentum: it does not blow rounding up where gradients vanish.
PLAIN = JobArguments(lr=0.5, adam_eps=0.5)
TIED = replace(PLAIN, untie_embeddings_and_output_weights=False)
EXPERTS = replace(PLAIN, num_experts=4, qk_layernorm=True, bf16=True)
BF16, FP16 = replace(PLAIN, bf16=True), replace(PLAIN, fp16=True, initial_loss_scale=2.0**10)
TP2PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "padded_vocab_size": 256}
TP2 = {"tensor_model_parallel_size": 2, "padded_vocab_size": 256}
VPP2 = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
CASES: dict[str, JobArguments] = {
    "fp32": PLAIN,
    "bf16": replace(BF16, **SHARDED),
    "fp16": FP16,
    "tied": replace(TIED, bf16=True),
    "experts": EXPERTS,
    "packed": BF16,
    "torch_adam": PLAIN,
    "fp32_tp2pp2": replace(PLAIN, **TP2PP2, **SHARDED),
    "bf16_tp2pp2": replace(BF16, **TP2PP2, **SHARDED),
    "bf16_pp2vpp2dp2": replace(BF16, **VPP2, **OVERLAPPED),
    "fp16_tp2dp2": replace(FP16, **TP2, **SHARDED),
    "tied_tp2pp2": replace(TIED, bf16=True, **TP2PP2),
    "experts_pp2ep2": replace(EXPERTS, pipeline_model_parallel_size=2, expert_model_parallel_size=2, **SHARDED),
    "packed_tp2pp2": replace(BF16, sequence_parallel=True, **TP2PP2, **SHARDED),
    "torch_adam_tp2pp2": replace(PLAIN, **TP2PP2),
    "torch_adam_tp2dp2": replace(PLAIN, **TP2),
}
TEXT = torch.arange(3, 19).view(2, 8)  # whose logits are compared


class Tokenizer(NumberTokenizer):
    """Sampling also wants texts."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return str(ids)


def filled(folder: Path) -> Callable[[list[GPTModel]], None]:
    """Writes the weights of a folder into a rank's chunks."""

    def fill(chunks: list[GPTModel]) -> None:
        context, architecture = ParallelContext.from_parallel_state(parallel_state), read_architecture(folder)
        layout = megatron_layout(architecture, context.grid, chunks[0].vocab_size, naming_of(chunks))
        load_folder(folder, layout, context.rank, chunk_tensors(chunks))

    return fill


def packing_provider(args: JobArguments, config: object) -> Callable[..., GPTModel]:
    """The job's provider with our layers, which take packed sequences and sequence parallelism."""

    def provide(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> GPTModel:
        return GPTModel(
            config=config,
            transformer_layer_spec=layer_spec(config, vp_stage),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )

    return provide


def actor_of(case: str, folder: Path) -> Actor:
    """The job of a case, taken over."""
    args = CASES[case]
    fill = filled(folder / "models" / ("experts" if args.num_experts else "plain" if _untied(args) else "tied"))
    more = {"token_budget": 60, "sampling": {"max_tokens": 4}}
    if "torch_adam" in case:
        config = transformer_config(args)
        chunks = get_model(args, config, local_provider(args, config))
        fill(chunks)
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=args.lr, betas=(0.9, 0.999), eps=args.adam_eps)
        return Actor(float16(args, config, chunks), Tokenizer(), optimizer, parallel_state, config=more)
    if case.startswith("lora"):
        config = transformer_config(args)
        chunks = get_model(args, config, provider_of(case, args)(args, config))
        fill(chunks)
        more |= {"lora": {"rank": 2}, "optimizer": {"learning_rate": args.lr, "epsilon": args.adam_eps}}
        return Actor(chunks, Tokenizer(), None, parallel_state, config=more)
    job: Job = build(args, fill, provider_of(case, args))
    return Actor(job.model, Tokenizer(), job.optimizer, parallel_state, scheduler=job.opt_param_scheduler, config=more)


def provider_of(case: str, args: JobArguments) -> Callable[..., Callable[..., torch.nn.Module]]:
    """What makes the chunks of a case."""
    if args.hybrid_layer_pattern:
        from hybrid_job import hybrid_provider  # where the installed megatron-core has the class

        return hybrid_provider
    return packing_provider if "packed" in case else local_provider


def _untied(args: JobArguments) -> bool:
    return args.untie_embeddings_and_output_weights


def own_logits(actor: Actor) -> torch.Tensor | None:
    """Logits of `TEXT` by the job's own chunks through Megatron's own schedule, ``[b, s, vocab]`` fp32; on the last
    stage, whole on its first tensor-parallel rank."""

    def forward(iterator: Iterator, chunk: torch.nn.Module) -> tuple:
        logits = chunk(TEXT, torch.arange(TEXT.shape[1]).expand_as(TEXT), None)
        return logits, lambda output, non_loss_data=False: output.float()

    for chunk in actor.engine.chunks:
        chunk.eval()
    model = actor.engine.chunks
    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter([None] * 4) for _ in model] if len(model) > 1 else iter([None] * 4),
            model=model if len(model) > 1 else model[0],
            num_microbatches=2,
            seq_length=TEXT.shape[1],
            micro_batch_size=TEXT.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    if not actor.context.is_last_stage:
        return None
    parts = [torch.empty_like(found[0]) for _ in range(actor.context.sizes.tp)]
    dist.all_gather(parts, found[0].contiguous(), group=actor.context.tp_group)
    return torch.cat(parts, -1)[..., : actor.engine.architecture.vocab]


def run_case(case: str, folder: Path) -> None:
    actor = actor_of(case, folder)
    context, reference = actor.context, Reference(actor)
    grpo = GRPO(actor, reference, kl_coefficient=0.05, log_entropy=True, old_logprobs="recompute")
    dpo, steps = DPO(actor, reference), []
    for number in range(4):
        batch = sampled_batch(context) if number < 3 else fixed_batch(context)
        (grpo if number < 3 else dpo).update()(batch)
        steps.append(
            {k: v for k, v in batch.metrics.items() if k.startswith(("loss/", "policy/entropy", "optimizer/"))}
        )
    actor.save_pretrained(folder / case)
    logits = own_logits(actor)
    if logits is not None and context.coordinates.tp == context.coordinates.dp == 0:
        torch.save(logits, folder / f"{case}.pt")
    if context.rank == 0:
        print("RESULT " + json.dumps([case, steps]), flush=True)
    if case == "bf16_tp2pp2":
        one_rank_changes(actor)
    if case == "bf16_pp2vpp2dp2":
        job_takes_a_step(actor)
    if case == "fp32_tp2pp2":
        one_rank_is_wrong(actor)


def one_rank_changes(actor: Actor) -> None:
    """Every rank pushes, and as the same version, whichever rank the change is on."""
    sample(actor)
    version, rank = actor.policy_version, actor.context.rank
    sample(actor)
    assert actor.policy_version == version
    for changed in range(actor.context.world_size):
        if rank == changed:  # what no other rank holds
            actor.engine.tensors()["decoder.layers.0.mlp.linear_fc1.weight"].mul_(1.5)
        assert is_current(actor) == (rank != changed)
        faults = actor.verify_weights().faults
        assert len(faults) == 1, faults
        assert f"training rank {changed} holds other weights" in faults[0]
        assert {one.policy_version for one in sample(actor).samples} == {version + changed + 1}
        assert not actor.verify_weights().faults
    if rank == 1:  # said on one rank only: the others follow
        actor.weights_changed()
    assert {one.policy_version for one in sample(actor).samples} == {version + actor.context.world_size + 1}
    assert is_current(actor)


def job_takes_a_step(actor: Actor) -> None:
    """Of its own, with gradients that are still there: the new values wait on the rank that has computed them."""
    sample(actor)
    version = actor.policy_version
    assert is_current(actor)
    assert actor.engine.optimizer.step()[0]
    assert not is_current(actor)
    assert {one.policy_version for one in sample(actor).samples} == {version + 1}
    assert not actor.verify_weights().faults
    assert is_current(actor)


def sample(actor: Actor) -> Batch:
    batch = Batch(prompts=[Prompt([3, 4, 5], index=0)])
    actor.sample().run(batch)
    return batch


def one_rank_is_wrong(actor: Actor) -> None:
    """What is wrong on one rank is an error on all, in the same words."""
    optimizer = actor.engine.optimizer if actor.context.rank != 2 else ["not an optimizer"]
    with pytest.raises(ConfigError, match="optimizer is a list, expected Megatron-Core's"):
        Actor(actor.engine.chunks, Tokenizer(), optimizer, parallel_state)


def main(folder: Path, cases: list[str]) -> None:
    current_platform().init_process_group(timeout=120)
    for case in cases:
        initialize(CASES[case])
        run_case(case, folder)
        ParallelContext.forget()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
