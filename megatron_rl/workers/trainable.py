"""`TrainableModel`: a `MegatronModel` with an optimizer, and the loop over epochs, mini-batches and optimizer steps.

Actor and Critic are both one; they differ in what their head computes and in nothing here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.data.packing import MicroBatch
from megatron_rl.workers.balance import balance
from megatron_rl.workers.heads import LossFunction, loss_head
from megatron_rl.workers.loss import Mean, Totals
from megatron_rl.workers.mini_batches import split_mini_batches, unit_ids
from megatron_rl.workers.optimizer import can_fall, gradient_hooks, loss_scalers
from megatron_rl.workers.schedule import plan_micro_batches, run_schedule
from megatron_rl.workers.scoring import ScoringModel

logger = logging.getLogger(__name__)

Scorer = Callable[[MicroBatch, Tensor], dict[str, Tensor | None]]


@dataclass(frozen=True, slots=True)
class Optimization:
    """How one batch is turned into optimizer steps."""

    num_epochs: int = 1  # passes over the batch
    num_mini_batches: int = 1  # optimizer steps of one pass
    reads: tuple[str, ...] = ()  # token fields that the loss reads, besides response_mask
    sequence_reads: tuple[str, ...] = ()  # sequence fields that the loss reads
    group_field: str | None = None  # sequences with equal values stay in one micro-batch and mini-batch
    seed: int = 0  # of the permutation into mini-batches


@dataclass
class TrainableModel(ScoringModel):
    """A model and what trains it."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler | None
    name: str = "actor"  # in errors and metrics
    num_steps: int = field(default=0, init=False)  # optimizer steps so far
    num_updates: int = field(default=0, init=False)  # calls of `optimize` so far

    def optimize(
        self, batch: Batch, loss: LossFunction, how: Optimization, scorer: Callable[[Batch], Scorer]
    ) -> dict[str, float]:
        """Run every mini-batch of every epoch.

        Args:
            scorer: batch -> the function that turns hidden states into what the loss sees.

        Returns:
            Metrics over all steps and ranks, and ``optimizer/...``.

        Raises:
            FloatingPointError: the loss or the gradient of a step is not finite; that step has changed nothing. Not
                where a loss scale that can still fall has made it overflow: that step is skipped and counted.
        """
        collected: list[dict[str, Mean]] = []
        norms: list[float | None] = []  # None: a skipped step
        for epoch in range(how.num_epochs):
            for members in self._mini_batches(batch, how, epoch):
                part = batch.select(members) if len(members) < batch.num_sequences else batch
                means, norm = self._step(part, loss, how, scorer)
                collected += means
                norms.append(norm)
        metrics = self._reduce(collected)
        taken = [norm for norm in norms if norm is not None]
        if taken:
            metrics["optimizer/gradient_norm"] = sum(taken) / len(taken)
        metrics["optimizer/learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        metrics["optimizer/steps"] = float(len(taken))
        if loss_scalers(self.optimizer):
            metrics["optimizer/skipped_steps"] = float(len(norms) - len(taken))
            metrics["optimizer/loss_scale"] = float(self.optimizer.get_loss_scale())
        self.num_updates += 1
        return metrics

    @torch.no_grad()
    def measure(
        self, batch: Batch, loss: LossFunction, how: Optimization, scorer: Callable[[Batch], Scorer]
    ) -> dict[str, float]:
        """The loss and its metrics over all ranks on the whole batch, without a step."""
        model = self.model
        batch, groups = self._balanced(batch, how)
        totals = self._totals(batch, groups)
        micro_batches = plan_micro_batches(batch, model, self.micro_batching, groups)
        for chunk in model.chunks:
            chunk.eval()
        head = loss_head(model, batch, loss, totals, how.reads, how.sequence_reads, scorer(batch))
        results = run_schedule(model, batch, micro_batches, lambda *given: head(*given)[1], backward=False)
        return self._reduce(self._with_total(results))

    def _with_total(self, results: Sequence[tuple[Tensor, dict[str, Mean]]]) -> list[dict[str, Mean]]:
        """The metrics of all micro-batches, and their loss as one more."""
        if not results:
            return []
        value = torch.as_tensor(sum(result[0].double() for result in results), device=self.model.device)
        share = torch.ones((), device=self.model.device) / self.model.context.dp_cp_size
        return [*(dict(result[1]) for result in results), {"loss/total": Mean(value.float(), share)}]

    def _mini_batches(self, batch: Batch, how: Optimization, epoch: int) -> list[list[int]]:
        groups = batch.sequences[how.group_field].tolist() if how.group_field else None
        units = unit_ids(batch.num_sequences, groups)
        context = self.model.context
        counts = _gather_counts(max(units, default=-1) + 1, context.dp_group, self.model.device)
        return split_mini_batches(units, counts, context.coordinates.dp, how.num_mini_batches, how.seed + epoch)

    def _balanced(self, batch: Batch, how: Optimization) -> tuple[Batch, list[int] | None]:
        """The batch with even work on all data-parallel ranks, and the unit of each of its sequences."""
        groups = batch.sequences[how.group_field].tolist() if how.group_field else None
        balanced = balance(batch, self.model.context.dp_group, groups, by_tokens=self.micro_batching.packing)
        return balanced.batch, balanced.units

    def _step(
        self, batch: Batch, loss: LossFunction, how: Optimization, scorer: Callable[[Batch], Scorer]
    ) -> tuple[list[dict[str, Mean]], float | None]:
        model = self.model
        batch, groups = self._balanced(batch, how)
        totals = self._totals(batch, groups)
        micro_batches = plan_micro_batches(batch, model, self.micro_batching, groups)
        for chunk in model.chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
            chunk.train()
        self.optimizer.zero_grad()
        head = loss_head(model, batch, loss, totals, how.reads, how.sequence_reads, scorer(batch))
        with gradient_hooks(model.chunks, self.optimizer):
            results = run_schedule(model, batch, micro_batches, head, backward=True)
        value = sum(result[0].double() for result in results) if results else torch.zeros((), dtype=torch.float64)
        self._require_finite({"loss": float(value), "gradient": self._largest_gradient()})
        return self._with_total(results), self._optimizer_step()

    def _optimizer_step(self) -> float | None:
        """The gradient's norm, or None where an overflow under a loss scale made Megatron skip the step: then neither
        weights nor schedule have moved, as in Megatron-LM's own loop."""
        at_limit = all(not can_fall(scaler) for scaler in loss_scalers(self.optimizer))
        if self.scheduler is not None:
            self.scheduler.step(increment=1)
        updated, norm, _ = self.optimizer.step()
        if updated:
            self.num_steps += 1
            return float(norm or 0.0)
        if self.scheduler is not None:
            self.scheduler.step(increment=-1)
        if at_limit:
            raise FloatingPointError(
                f"{self.name}: the gradient of optimizer step {self.num_steps} is not finite, and the loss scale "
                f"({float(self.optimizer.get_loss_scale()):g}) cannot fall: lower the learning rate, train in bf16, or "
                "look for NaN rewards or log-probabilities in this step's metrics"
            )
        logger.info("%s: an overflow at this loss scale, step skipped", self.name)
        return None

    def _totals(self, batch: Batch, groups: Sequence[int] | None) -> Totals:
        """Global counts of what is trained on; an empty sequence or group counts not at all. A mask position is trained
        on where some position predicts it: never a sequence's first."""
        mask = batch.tokens["response_mask"].clone()
        starts = batch.cu_seqlens[:-1]
        mask[starts[starts < mask.numel()]] = False
        per_sequence = torch.zeros(batch.num_sequences).index_add(0, batch.sequence_ids, mask.float())
        trained = per_sequence > 0
        units = {group for group, kept in zip(groups or (), trained.tolist(), strict=False) if kept}
        counts = torch.tensor([float(mask.sum()), float(trained.sum()), float(len(units))], dtype=torch.float64)
        counts = counts.to(self.model.device)
        if self.model.context.grid.dp > 1:
            dist.all_reduce(counts, group=self.model.context.dp_group)
        tokens, sequences, num_units = counts.tolist()
        return Totals(tokens=max(tokens, 1.0), sequences=max(sequences, 1.0), groups=max(num_units, 1.0))

    def _largest_gradient(self) -> float:
        """Magnitude of the largest element on this rank; not finite where any is not. 0 with a loss scale: such an
        optimizer finds overflows itself, and skips their steps."""
        if getattr(self.optimizer.config, "fp16", False):
            return 0.0
        found = (
            getattr(parameter, "main_grad", None) for chunk in self.model.chunks for parameter in chunk.parameters()
        )
        gradients = [gradient for gradient in found if gradient is not None]
        return float(torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)) if gradients else 0.0

    def _require_finite(self, values: Mapping[str, float]) -> None:
        bad = torch.tensor([float(not math.isfinite(value)) for value in values.values()], device=self.model.device)
        if dist.get_world_size() > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        for (what, value), flag in zip(values.items(), bad.tolist(), strict=True):
            if flag:
                raise FloatingPointError(
                    f"{self.name}: the {what} of optimizer step {self.num_steps} is not finite on some rank "
                    f"({value} here): "
                    "lower the learning rate, or look for NaN rewards or log-probabilities in this step's metrics"
                )

    def _reduce(self, collected: Sequence[dict[str, Mean]]) -> dict[str, float]:
        """Metrics over all ranks that computed some: the last stage, one rank of each tensor-parallel group. A mean of
        nothing is left out: 0 would be taken for a measurement."""
        sums: dict[str, list[float]] = {}
        if self.model.context.coordinates.tp == 0:
            for metrics in collected:
                for name, mean in metrics.items():
                    _add(sums, name, float(mean.total), float(mean.weight))
        merged: dict[str, list[float]] = {}
        for part in self.model.context.gather_objects(sums):
            for name, (total, weight) in part.items():
                _add(merged, name, total, weight)
        return {name: total / weight for name, (total, weight) in sorted(merged.items()) if weight}


def _add(sums: dict[str, list[float]], name: str, total: float, weight: float) -> None:
    """Totals and weights of means add up; of what ends in ``_max`` the largest stays."""
    entry = sums.setdefault(name, [0.0, 0.0])
    if name.endswith("_max"):
        entry[:] = max(entry[0], total) if entry[1] else total, 1.0
    else:
        entry[:] = entry[0] + total, entry[1] + weight


def _gather_counts(count: int, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    if group is None or group.size() == 1:
        return [count]
    counts = torch.zeros(group.size(), dtype=torch.int64, device=device)
    counts[group.rank()] = count
    dist.all_reduce(counts, group=group)
    return counts.tolist()
