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
from megatron_rl.data.packing import MicroBatch, gather
from megatron_rl.models.megatron_chunk import output_weight
from megatron_rl.ops.token_logprobs import token_logprobs
from megatron_rl.workers.loss import LossInputs, LossOutput, Mean, Totals
from megatron_rl.workers.megatron_model import MegatronModel
from megatron_rl.workers.schedule import Head

LossFunction = Callable[[LossInputs], LossOutput]


def score_tokens(
    model: MegatronModel, batch: Batch, temperature: float, with_entropy: bool
) -> Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor | None]]:
    """(micro-batch, hidden ``[n, hidden]``) -> (log-probabilities, entropies) of the predicted tokens, ``[n]`` fp32.

    Where the batch has a ``response_mask``, only of the tokens in it: logits of prompts and padding are never computed,
    and these positions get 0.
    """

    def score(micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = micro_batch.labels(batch).to(hidden.device)
        index = _scored_positions(micro_batch, batch)
        if index is None:
            return scores(hidden, labels)
        index, length = index.to(hidden.device), len(hidden)
        if not index.numel():  # one position all the same, times 0: the graph and its collectives must exist
            first, _ = scores(hidden[:1], labels[:1])
            nothing = _spread(first * 0.0, index.new_zeros(1), length)
            return nothing, nothing if with_entropy else None
        logprobs, entropy = scores(hidden.index_select(0, index), labels[index])
        return _spread(logprobs, index, length), None if entropy is None else _spread(entropy, index, length)

    def scores(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = output_weight(model.last_chunk)
        return token_logprobs(
            hidden,
            weight,
            labels,
            vocab_start=model.context.coordinates.tp * weight.shape[0],
            vocab_size=model.architecture.vocab,
            temperature=temperature,
            group=model.context.tp_group if model.context.sizes.tp > 1 else None,
            with_entropy=with_entropy,
        )

    return score


def _scored_positions(micro_batch: MicroBatch, batch: Batch) -> Tensor | None:
    """Positions that predict a token of the response; None = all of them."""
    if "response_mask" not in batch.tokens:
        return None
    mask = gather(batch.tokens["response_mask"], micro_batch.target_index)
    index = mask.nonzero().squeeze(1)
    return None if index.numel() == mask.numel() else index


def _spread(values: Tensor, index: Tensor, length: int) -> Tensor:
    return values.new_zeros(length).index_copy(0, index, values)


def logprob_head(model: MegatronModel, batch: Batch, temperature: float) -> Head:
    """Head of a forward-only pass: log-probabilities ``[n]``; see `score_tokens` for which."""
    score = score_tokens(model, batch, temperature, with_entropy=False)
    return lambda micro_batch, hidden: score(micro_batch, hidden)[0]


def value_head(model: MegatronModel, batch: Batch, temperature: float) -> Head:
    """Head of a forward-only pass through a model with a value head: values ``[n]`` fp32."""
    return lambda micro_batch, output: output.squeeze(-1).float()


def second_head(model: MegatronModel) -> Callable[[Tensor], Tensor]:
    """Hidden states ``[n, hidden]`` -> values ``[n]`` fp32 of the value head beside the output layer."""
    return lambda hidden: model.last_chunk.value_head.beside_logits(hidden)  # type: ignore[operator,union-attr]


def shared_value_head(model: MegatronModel, batch: Batch, temperature: float) -> Head:
    """Head of a forward-only pass: values ``[n]`` fp32 of a critic on the policy's weights."""
    values = second_head(model)
    return lambda micro_batch, hidden: values(hidden)


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
