"""Output functions: from the hidden states of the last layer to log-probabilities, values and losses.

Each function here makes an `Output` for an engine's `forward` or `forward_backward`. Log-probabilities are computed for
the tokens of the response mask only, and the fp32 logits of a whole micro-batch never exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.data.packing import MicroBatch, gather
from megatron_rl.engines.base import Output, TrainingEngine
from megatron_rl.workers.loss import LossFunction, LossInputs, Mean, Totals

# (micro-batch, hidden states) -> the fields of `LossInputs` that come from the model
Predict = Callable[[MicroBatch, Tensor], dict[str, Tensor | None]]
# (engine, batch, temperature) -> the output function of a forward pass over that batch
MakeOutput = Callable[[TrainingEngine, Batch, float], Output]


def predicted_tokens(
    engine: TrainingEngine, batch: Batch, temperature: float, with_entropy: bool
) -> Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor | None]]:
    """(micro-batch, hidden ``[n, hidden]``) -> (log-probabilities, entropies) of the predicted tokens, ``[n]`` fp32.

    Where the batch has a ``response_mask``, only of the tokens in it: logits of prompts and padding are never computed,
    and these positions get 0.
    """

    def predicted(micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = micro_batch.labels(batch).to(hidden.device)
        index = _predicting_positions(micro_batch, batch)
        if index is None:
            return of(hidden, labels)
        index, length = index.to(hidden.device), len(hidden)
        if not index.numel():  # one position, times 0: the graph and its collectives must exist on every rank
            first, _ = of(hidden[:1], labels[:1])
            nothing = _spread(first * 0.0, index.new_zeros(1), length)
            return nothing, nothing if with_entropy else None
        logprobs, entropy = of(hidden.index_select(0, index), labels[index])
        return _spread(logprobs, index, length), None if entropy is None else _spread(entropy, index, length)

    def of(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        return engine.token_logprobs(hidden, labels, temperature, with_entropy)

    return predicted


def _predicting_positions(micro_batch: MicroBatch, batch: Batch) -> Tensor | None:
    """Positions that predict a token of the response; None = all of them."""
    if "response_mask" not in batch.tokens:
        return None
    mask = gather(batch.tokens["response_mask"], micro_batch.target_index)
    index = mask.nonzero().squeeze(1)
    return None if index.numel() == mask.numel() else index


def _spread(values: Tensor, index: Tensor, length: int) -> Tensor:
    return values.new_zeros(length).index_copy(0, index, values)


def logprob_output(engine: TrainingEngine, batch: Batch, temperature: float) -> Output:
    """Log-probabilities ``[n]``; see `predicted_tokens` for which."""
    predicted = predicted_tokens(engine, batch, temperature, with_entropy=False)
    return lambda micro_batch, hidden: predicted(micro_batch, hidden)[0]


def value_output(engine: TrainingEngine, batch: Batch, temperature: float) -> Output:
    """Values ``[n]`` fp32, of a value model or of a value head beside the output layer."""
    return lambda micro_batch, hidden: engine.values(hidden)


def loss_output(
    engine: TrainingEngine,
    batch: Batch,
    loss: LossFunction,
    totals: Totals,
    reads: Sequence[str],
    sequence_reads: Sequence[str],
    predict: Predict,
) -> Output:
    """``(loss, (loss value, metrics))`` of a training pass. Empty micro-batches contribute an exact 0."""

    def output(micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Mean]]]:
        predictions = predict(micro_batch, hidden)
        if not micro_batch.members:
            nothing = torch.stack([value.sum() * 0.0 for value in predictions.values() if value is not None]).sum()
            return nothing, (nothing.detach(), {})
        device = hidden.device
        names = dict.fromkeys(("response_mask", *reads))
        inputs = LossInputs(
            fields={k: v.to(device) for k, v in micro_batch.token_fields(batch, list(names)).items()},
            sequences={k: v.to(device) for k, v in micro_batch.sequence_fields(batch, sequence_reads).items()},
            sequence_ids=micro_batch.sequence_ids.to(device),
            num_sequences=len(micro_batch.members),
            totals=totals,
            cp_group=engine.context.cp_group if engine.context.sizes.cp > 1 else None,
            **_with_logprobs(predictions),
        )
        found = loss(inputs)
        value = found.loss.detach() / (inputs.cp_size if found.of_sequences else 1)
        return found.loss, (value, dict(found.metrics))

    return output


def _with_logprobs(predictions: dict[str, Tensor | None]) -> dict[str, Any]:
    """A critic has values and no log-probabilities: an empty tensor, so that a loss that reads them fails."""
    absent = torch.empty(0)
    return {"logprobs": absent} | predictions


def collect_token_values(
    engine: TrainingEngine, batch: Batch, micro_batches: Sequence[MicroBatch], results: Sequence[Tensor]
) -> Tensor:
    """Bring the per-token results of all micro-batches to every rank of the model replica, ``[num_tokens]`` fp32 on the
    CPU. Tokens that are never predicted (the first of each sequence) get 0."""
    out = torch.zeros(batch.num_tokens, dtype=torch.float32, device=engine.device)
    for micro_batch, values in zip(micro_batches, results, strict=False):
        micro_batch.scatter(values.float(), out)
    context = engine.context
    if context.sizes.cp > 1:
        dist.all_reduce(out, group=context.cp_group)
    if context.sizes.pp > 1:
        dist.all_reduce(out, group=context.pp_group)
    return out.cpu()
