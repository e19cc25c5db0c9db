"""Running micro-batches through Megatron-Core's own pipeline schedule, forward only or with backward.

`get_forward_backward_func` wants a data iterator, a forward step and a loss function. Here the data are `MicroBatch`
index records over one `Batch`, the forward step asks the model for hidden states instead of logits, and what happens
to the hidden states on the last stage is a function that is passed in.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError
from megatron_rl.data.packing import Alignment, MicroBatch, pack, pad, split_micro_batches
from megatron_rl.models.attention import packed_params
from megatron_rl.models.hidden_states import hidden_states
from megatron_rl.workers.megatron_model import MegatronModel

Head = Callable[
    [MicroBatch, Tensor], Any
]  # (micro-batch, hidden [n, hidden]) on the last stage -> what the caller wants


@dataclass(frozen=True, slots=True)
class MicroBatching:
    """How a batch is cut into micro-batches."""

    token_budget: int = 4096  # tokens of one micro-batch over all context-parallel ranks
    packing: bool = True  # False: padded rows
    rows: int | None = None  # sequences of a padded micro-batch; None = as many as the token budget holds


def plan_micro_batches(
    batch: Batch, model: MegatronModel, how: MicroBatching, units: Sequence[int] | None = None
) -> list[MicroBatch]:
    """Micro-batches of this rank, all of one shape, and as many on every data-parallel rank (collectives inside the
    model and its gradient reduction are entered equally often). A rank that needs fewer spreads its sequences over all
    of them; only one with fewer units than micro-batches has empty ones.

    Raises:
        ConfigError: a token lies outside of the vocabulary, on any data-parallel rank; with tensor parallelism the
            embedding would take it for a row of zeros.
    """
    context = model.context
    check_vocab(batch, model)
    sizes = context.sizes
    tp = sizes.tp if model.config.sequence_parallel else 1
    align = Alignment(sizes.cp, context.coordinates.cp, tp)
    lengths = [align.padded(length) for length in batch.lengths.tolist()]
    if how.packing:
        work, most = lengths, how.token_budget
        shares = split_micro_batches(work, most, units)
    else:
        width = _maximum(max(lengths, default=1), model)
        work, most = [1] * len(lengths), how.rows or max(1, how.token_budget // width)
        shares = fill_rows(range(batch.num_sequences) if units is None else units, most)
    count = _maximum(len(shares), model)
    if sizes.vpp > 1:  # the interleaved schedule wants a multiple of the pipeline stages
        count = -(-count // sizes.pp) * sizes.pp
    if count > len(shares):
        shares = split_micro_batches(work, most, units, at_least=count)
    if how.packing:
        width = _maximum(max((sum(lengths[i] for i in share) for share in shares), default=1), model)
    width = -(-width // align.row_multiple) * align.row_multiple
    if how.packing:
        return [pack(batch, share, align, width) for share in shares]
    tallest = _maximum(max((len(share) for share in shares), default=1), model)
    return [pad(batch, share, align, width, tallest) for share in shares]


def check_vocab(batch: Batch, model: MegatronModel) -> None:
    """Raises ConfigError, on all data-parallel ranks together, for token ids that the model has no row for."""
    ids, vocab = batch["input_ids"], model.architecture.vocab
    least, most = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    found = _maximum(most if least >= 0 else 2**62 - least, model)
    if vocab and found >= vocab:  # 0: Megatron chunks of a value model without a tokenizer
        token = found if found < 2**62 else 2**62 - found
        raise ConfigError(
            f"a batch has token id {token}, outside of the model's vocabulary of {vocab}: it was made with another "
            "model's tokenizer, or the tokenizer's new tokens have no rows in the embedding"
        )


def fill_rows(units: Sequence[int], rows: int) -> list[list[int]]:
    """Sequences in order of their units, cut so that no unit is split and at most ``rows`` lie in a micro-batch (a
    larger single unit has one of its own)."""
    shares: list[list[int]] = []
    for _, unit in itertools.groupby(sorted(range(len(units)), key=units.__getitem__), key=units.__getitem__):
        members = list(unit)
        if not shares or len(shares[-1]) + len(members) > rows:
            shares.append([])
        shares[-1] += members
    return shares


def _maximum(value: int, model: MegatronModel) -> int:
    """Over the data-parallel ranks."""
    if model.context.grid.dp == 1:
        return value
    tensor = torch.tensor(value, device=model.device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=model.context.dp_group)
    return int(tensor)


def run_schedule(
    model: MegatronModel, batch: Batch, micro_batches: Sequence[MicroBatch], head: Head, *, backward: bool
) -> list[Any]:
    """Run all micro-batches.

    Args:
        head: called on the last pipeline stage with each micro-batch and its hidden states
            ``[n, hidden]`` (a model with a value head: values ``[n, 1]``). With
            ``backward`` it returns ``(loss, result)``: ``loss`` is a scalar whose sum over micro-batches and
            data- and context-parallel ranks is the loss to differentiate. Without, it returns ``result``.

    Returns:
        The results in order on the last stage; an empty list elsewhere.
    """
    first = micro_batches[0]
    # Both of Megatron's conventions (`calculate_per_token_loss` or not) end in a division by micro-batches times
    # data- and context-parallel ranks times the "tokens" that every micro-batch reports: see `forward_step_calc_loss`,
    # `finalize_model_grads` and the gradient scaling of DistributedDataParallel. The first of them multiplies a
    # router's auxiliary losses by the positions of a micro-batch (`attach_and_log_load_balancing_loss`).
    num_tokens = first.rows * first.columns if model.config.num_moe_experts else 1
    scale = num_tokens * len(micro_batches) * model.context.dp_cp_size

    def loss_function(micro_batch: MicroBatch, output: Tensor, non_loss_data: bool = False) -> Any:
        hidden = output.reshape(-1, output.shape[-1])
        if not backward:
            return head(micro_batch, hidden)
        loss, result = head(micro_batch, hidden)
        return loss * scale, torch.tensor(num_tokens, dtype=torch.int, device=loss.device), result

    def forward_step(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        micro_batch = next(iterator)
        return _forward(model, batch, micro_batch, chunk), partial(loss_function, micro_batch)

    iterators = [iter(micro_batches) for _ in model.chunks]
    single = len(model.chunks) == 1
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=model.chunks[0] if single else model.chunks,
        num_microbatches=len(micro_batches),
        seq_length=first.columns * model.context.sizes.cp,
        micro_batch_size=first.rows,
        forward_only=not backward,
        collect_non_loss_data=not backward,
    )
    return results if model.context.is_last_stage else []


def _forward(model: MegatronModel, batch: Batch, micro_batch: MicroBatch, chunk: torch.nn.Module) -> Tensor:
    device = model.device
    packed = None
    if micro_batch.cu_seqlens is not None:
        packed = packed_params(micro_batch.cu_seqlens.to(device))
    with contextlib.nullcontext() if model.value_head else hidden_states(chunk):
        return chunk(
            micro_batch.input_ids(batch).to(device),
            micro_batch.position_ids.view(micro_batch.rows, micro_batch.columns).to(device),
            None,
            packed_seq_params=packed,
        )
