"""Running micro-batches through Megatron-Core's own pipeline schedule, forward only or with backward.

`get_forward_backward_func` wants a data iterator, a forward step and a loss function. Here the data are `MicroBatch`
index records over one `Batch`, the forward step asks the model for hidden states instead of logits, and what happens
to the hidden states on the last stage is the `Output` that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.data.packing import MicroBatch
from megatron_rl.devices import current_platform
from megatron_rl.engines.base import Output
from megatron_rl.engines.megatron.model.core_attention import packed_params
from megatron_rl.engines.megatron.model.hidden_states import hidden_states
from megatron_rl.engines.megatron.model.model_chunk import unwrap
from megatron_rl.parallel import ParallelContext


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    context: ParallelContext,
    batch: Batch,
    micro_batches: Sequence[MicroBatch],
    output: Output,
    *,
    backward: bool,
) -> list[Any]:
    """Run all micro-batches.

    Args:
        chunks: this rank's, one per virtual pipeline stage, wrapped or bare.
        output: called on the last pipeline stage; with ``backward`` as `TrainingEngine.forward_backward` has it,
            without as `TrainingEngine.forward`.

    Returns:
        The results in order on the last stage; an empty list elsewhere.
    """
    first = micro_batches[0]
    num_tokens = _reported_tokens(chunks[0], first)
    scale = num_tokens * len(micro_batches) * context.dp_cp_size  # undoes Megatron's division

    def loss_function(micro_batch: MicroBatch, hidden: Tensor, non_loss_data: bool = False) -> Any:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if not backward:
            return output(micro_batch, hidden)
        loss, result = output(micro_batch, hidden)
        return loss * scale, torch.tensor(num_tokens, dtype=torch.int, device=loss.device), result

    def forward_step(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        micro_batch = next(iterator)
        return _forward(batch, micro_batch, chunk), partial(loss_function, micro_batch)

    iterators = [iter(micro_batches) for _ in chunks]
    single = len(chunks) == 1
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators[0] if single else iterators,
        model=chunks[0] if single else list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=first.columns * context.sizes.cp,
        micro_batch_size=first.rows,
        forward_only=not backward,
        collect_non_loss_data=not backward,
    )
    return results if context.is_last_stage else []


def _reported_tokens(chunk: torch.nn.Module, micro_batch: MicroBatch) -> int:
    """The number of tokens to report to Megatron with each micro-batch's loss.

    Megatron divides gradients by the number of micro-batches, of data- and context-parallel ranks, and by the tokens
    that every micro-batch reports, with `calculate_per_token_loss` or without: see `forward_step_calc_loss`,
    `finalize_model_grads` and the gradient scaling of DistributedDataParallel. With it a router's auxiliary losses are
    multiplied by the positions of a micro-batch (`attach_and_log_load_balancing_loss`), so these are reported.
    """
    return micro_batch.rows * micro_batch.columns if unwrap(chunk).config.num_moe_experts else 1


def _forward(batch: Batch, micro_batch: MicroBatch, chunk: torch.nn.Module) -> Tensor:
    device = current_platform().device
    packed = None
    if micro_batch.cu_seqlens is not None:
        packed = packed_params(micro_batch.cu_seqlens.to(device))
    with hidden_states(chunk):  # a value head's output is left as it is
        return chunk(
            micro_batch.input_ids(batch).to(device),
            micro_batch.position_ids.view(micro_batch.rows, micro_batch.columns).to(device),
            None,
            packed_seq_params=packed,
        )
