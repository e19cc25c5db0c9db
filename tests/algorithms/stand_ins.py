"""Stand-ins for workers where only orchestration is tested: they record what they are asked and write constants."""

from __future__ import annotations

import torch

from megatron_rl.batch import Batch
from megatron_rl.dataflow import Stage
from megatron_rl.rollout import WeightCheck


class Standing:
    dp_group = None
    agreement = None


class StandInWorker:
    """Answers `logprobs`, `values` and `optimize`; keeps every call."""

    context = Standing()
    policy_version = 0

    def __init__(self, name: str = "actor", metrics: dict[str, float] | None = None) -> None:
        self.name = name
        self.metrics = metrics or {}
        self.calls: list[dict] = []

    def _token_stage(self, verb: str, write: str, value: float) -> Stage:
        def run(batch: Batch) -> None:
            batch.tokens[write] = torch.full((batch.num_tokens,), value)

        return Stage(f"{self.name}.{verb}", run, reads=("input_ids",), writes=(write,))

    def logprobs(self, write: str) -> Stage:
        return self._token_stage("logprobs", write, -1.0 if self.name == "actor" else -1.5)

    def verify_weights(self) -> WeightCheck:
        return WeightCheck()

    def values(self, write: str) -> Stage:
        return self._token_stage("values", write, 0.25)

    def optimize(self, batch: Batch, loss, **how) -> dict[str, float]:
        units = (how["group_field"],) if how["group_field"] else ()
        fields = {name: batch[name].clone() for name in (*how["reads"], *how["sequence_reads"], *units)}
        self.calls.append({"loss": loss, "fields": fields, "mask": batch["response_mask"].clone(), **how})
        return dict(self.metrics)
