"""One rank's work for `megatron-rl doctor`: the same update on each layout of one world size, measured.

Started by torchrun: ``python -m megatron_rl.run.doctor.measure PLAN RANKS``. Rank 0 writes what was found.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from megatron_rl.algorithms import BaseAlgorithm, OfflineAlgorithm, RewardModelling
from megatron_rl.batch import Batch
from megatron_rl.config import ConfigRecord
from megatron_rl.dataflow import Flow
from megatron_rl.devices import current_platform
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.run.build import find_algorithm
from megatron_rl.run.doctor.random_data import NumberTokenizer, fixed_batch, sampled_batch
from megatron_rl.run.doctor.variants import Variant, variants_for
from megatron_rl.run.run_config import RunConfig
from megatron_rl.trainer.metrics import reduce_metrics
from megatron_rl.workers import Actor, Critic, Reference
from megatron_rl.workers.actor_config import ActorConfig

LEARNING_RATE = 0.05  # of plain gradient descent, so that a change of weights is the gradient
NOT_COMPARED = ("time/",)
NUMBERS = ("groups", "pairs")  # of prompts and pairs: each rank counts its own


class Plan(ConfigRecord):
    """The parent process's instructions to its ranks."""

    config: RunConfig
    """The configuration under test."""
    folder: Path
    """Folder of the random models and of the measurements."""
    max_ranks: int = Field(ge=1)
    """Largest world size."""
    has_experts: bool
    """Whether the small model has them."""
    under_fsdp2: bool = False
    """Whether FSDP2 trains: there are only data-parallel layouts then."""
    timeout: float = Field(gt=0)
    """Seconds that a collective may wait."""

    @property
    def actor(self) -> Path:
        return self.folder / "actor"

    def result(self, ranks: int) -> Path:
        """Where the measurements of one world size go."""
        return self.folder / f"measured_{ranks}.pt"

    def export(self, variant: Variant, role: str) -> Path:
        """Where the weights after the update go."""
        return self.folder / "after" / f"{variant.ranks} {variant.name}" / role


@dataclass
class Parts:
    """The workers of one layout."""

    algorithm: BaseAlgorithm
    actor: Actor | None
    critic: Critic | None

    @property
    def context(self) -> ParallelContext:
        worker = self.actor or self.critic
        assert worker is not None
        return worker.context


def build(plan: Plan, variant: Variant) -> Parts:
    """The configured algorithm over random models in this layout."""
    kind, algorithm_config = find_algorithm(plan.config)
    sgd = OptimizerConfig(optimizer="sgd", learning_rate=LEARNING_RATE, clip_gradient=0.0)
    own = {"optimizer": sgd, "seed": plan.config.seed, "value_head": plan.config.actor.value_head}
    config = ActorConfig(**{**own, **variant.worker, "backend": "fsdp2" if plan.under_fsdp2 else "megatron"})
    context = ParallelContext.create(ParallelSizes(**variant.sizes), timeout=plan.timeout, seed=plan.config.seed)
    if issubclass(kind, RewardModelling):
        critic = Critic(str(plan.folder / "critic"), context=context, config=config)
        return Parts(kind(critic, algorithm_config), None, critic)
    tokenizer = NumberTokenizer()
    actor = Actor(str(plan.actor), tokenizer, context=context, config=config)
    reference, value_model = None, None
    if plan.config.reference is not None:
        # Its weights differ from the actor's: otherwise every KL would be 0.
        reference = Reference(str(plan.folder / "reference"), tokenizer, context=context, config=config)
    if plan.config.critic is not None:
        value_model = Critic(str(plan.folder / "critic"), context=context, config=config)
    return Parts(kind(actor, reference, value_model, algorithm_config), actor, value_model)


def measure(plan: Plan, variant: Variant) -> dict[str, Any]:
    """One update. Fields of the batch come from every rank, as ``{name: [(dp rank, tensor), ...]}``."""
    parts = build(plan, variant)
    offline = isinstance(parts.algorithm, OfflineAlgorithm)
    batch = fixed_batch(parts.context) if offline else sampled_batch(parts.context)
    fields = run_stages(parts.algorithm.update(), batch)
    for name in {*NUMBERS, parts.algorithm.group_field or ""} & set(fields):
        del fields[name]
    context = parts.context
    gathered = context.gather_objects((context.coordinates.dp, fields))
    metrics = reduce_metrics(context.gather_objects(batch.metrics))
    for role, worker in {"actor": parts.actor, "critic": parts.critic}.items():
        if worker is not None:
            worker.save_pretrained(plan.export(variant, role))
    return {
        "fields": {name: [(dp, found[name]) for dp, found in gathered] for name in fields},
        "metrics": {name: value for name, value in metrics.items() if not name.startswith(NOT_COMPARED)},
    }


def run_stages(flow: Flow, batch: Batch) -> dict[str, Tensor]:
    """Run the flow stage by stage; every tensor that a stage wrote, as it was when the stage had ended."""
    flow.check(batch)
    seen: dict[str, Tensor] = {}
    for stage in flow.stages:
        stage.run(batch)
        for name in stage.writes:
            if name in batch.tokens or name in batch.sequences:
                seen[name] = batch[name].detach().cpu().clone()
    return seen


def main(plan: Plan, ranks: int) -> None:
    """Every variant of one world size."""
    current_platform().init_process_group(timeout=plan.timeout)
    results = {}
    for variant in variants_for(plan.max_ranks, plan.has_experts, plan.under_fsdp2)[ranks]:
        if dist.get_rank() == 0:
            (plan.folder / "running").write_text(variant.name)
        results[variant.name] = measure(plan, variant)
        ParallelContext.forget()
    if dist.get_rank() == 0:
        torch.save(results, plan.result(ranks))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Plan.model_validate_json(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
