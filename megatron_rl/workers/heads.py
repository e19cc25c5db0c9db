"""What happens to hidden states on the last pipeline stage: log-probabilities, values, losses.

Each function here makes a `Head` for `run_schedule`. Log-probabilities come from `ops.token_logprobs`, which never
holds the fp32 logits of a whole micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.data.packing import MicroBatch
from megatron_rl.models.megatron_chunk import output_weight
from megatron_rl.ops.token_logprobs import token_logprobs
from megatron_rl.workers.loss import LossInputs, LossOutput, Mean, Totals
from megatron_rl.workers.megatron_model import MegatronModel
from megatron_rl.workers.schedule import Head

LossFunction = Callable[[LossInputs], LossOutput]


def score_tokens(
    model: MegatronModel, batch: Batch, temperature: float, with_entropy: bool
) -> Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor | None]]:
    """(micro-batch, hidden ``[n, hidden]``) -> (log-probabilities, entropies) of the predicted tokens, ``[n]`` fp32."""

    def score(micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = output_weight(model.last_chunk)
        return token_logprobs(
            hidden,
            weight,
            micro_batch.labels(batch).to(hidden.device),
            vocab_start=model.context.coordinates.tp * weight.shape[0],
            vocab_size=model.architecture.vocab,
            temperature=temperature,
            group=model.context.tp_group if model.context.sizes.tp > 1 else None,
            with_entropy=with_entropy,
        )

    return score


def logprob_head(model: MegatronModel, batch: Batch, temperature: float) -> Head:
    """Head of a forward-only pass: log-probabilities ``[n]``."""
    score = score_tokens(model, batch, temperature, with_entropy=False)
    return lambda micro_batch, hidden: score(micro_batch, hidden)[0]


def value_head(model: MegatronModel, batch: Batch, temperature: float) -> Head:
    """Head of a forward-only pass through a model with a value head: values ``[n]`` fp32."""
    return lambda micro_batch, output: output.squeeze(-1).float()


def loss_head(
    model: MegatronModel,
    batch: Batch,
    loss: LossFunction,
    totals: Totals,
    reads: Sequence[str],
    sequence_reads: Sequence[str],
    score: Callable[[MicroBatch, Tensor], dict[str, Tensor | None]],
) -> Head:
    """Head of a training pass: ``(loss, (loss value, metrics))``. Empty micro-batches contribute an exact 0."""

    def head(micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Mean]]]:
        outputs = score(micro_batch, hidden)
        if not micro_batch.members:
            nothing = torch.stack([value.sum() * 0.0 for value in outputs.values() if value is not None]).sum()
            return nothing, (nothing.detach(), {})
        device = hidden.device
        names = dict.fromkeys(("response_mask", *reads))
        inputs = LossInputs(
            fields={k: v.to(device) for k, v in micro_batch.token_fields(batch, list(names)).items()},
            sequences={k: v.to(device) for k, v in micro_batch.sequence_fields(batch, sequence_reads).items()},
            sequence_ids=micro_batch.sequence_ids.to(device),
            num_sequences=len(micro_batch.members),
            totals=totals,
            cp_group=model.context.cp_group if model.context.sizes.cp > 1 else None,
            **_scores(outputs),
        )
        output = loss(inputs)
        value = output.loss.detach() / (inputs.cp_size if output.of_sequences else 1)
        return output.loss, (value, dict(output.metrics))

    return head


def _scores(outputs: dict[str, Tensor | None]) -> dict[str, Any]:
    """A critic has values and no log-probabilities; a loss that reads what is absent should fail loudly."""
    absent = torch.empty(0)
    return {"logprobs": absent} | outputs


def collect_token_values(
    model: MegatronModel, batch: Batch, micro_batches: Sequence[MicroBatch], results: Sequence[Tensor]
) -> Tensor:
    """Bring the per-token results of all micro-batches to every rank of the model replica, ``[num_tokens]`` fp32 on the
    CPU. Tokens that are never predicted (the first of each sequence) get 0."""
    out = torch.zeros(batch.num_tokens, dtype=torch.float32, device=model.device)
    for micro_batch, values in zip(micro_batches, results, strict=False):
        micro_batch.scatter(values.float(), out)
    context = model.context
    if context.sizes.cp > 1:
        dist.all_reduce(out, group=context.cp_group)
    if context.sizes.pp > 1:
        dist.all_reduce(out, group=context.pp_group)
    return out.cpu()
