"""The last hidden states of any Megatron model, without its logits.

Logits over a whole vocabulary are the largest tensor of a training step. `hidden_states` makes a model return what
goes into its output layer instead, and `ops.token_logprobs` computes log-probabilities from there in chunks:

    with hidden_states(chunk):
        hidden = chunk(input_ids, position_ids, None, packed_seq_params=packed)     # [b, s, hidden]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from megatron_rl.engines.megatron.model.model_chunk import output_weight, unwrap
from megatron_rl.engines.megatron.model.value_head import ValueHead


@contextlib.contextmanager
def hidden_states(chunk: nn.Module) -> Iterator[None]:
    """Within this context the forward of the last chunk returns hidden states ``[b, s, hidden]`` in place of logits.

    They have the dtype of the output layer's weight, however the chunk is wrapped: Megatron's ``Float16Module`` makes
    fp32 of what a last stage returns (megatron/core/transformer/module.py), which is meant for logits.

    They are whole on each tensor-parallel rank, and each rank's gradient is a partial sum (what its part of the
    vocabulary contributes): the sum over the ranks is taken in the backward pass, as it is for logits. Chunks that are
    not last, and those with a `ValueHead`, are left as they are. Only the forward has to lie inside the context.
    """
    model = unwrap(chunk)
    if not model.post_process or isinstance(model.output_layer, ValueHead):
        yield
        return
    layer, group = model.output_layer, model.pg_collection.tp
    sequence_parallel = model.config.sequence_parallel

    def forward(hidden: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        return whole_hidden(hidden, group, sequence_parallel), None

    dtype = output_weight(model).dtype
    # On the outermost wrapper, so that it runs after everything that wrappers do to the output.
    handle = chunk.register_forward_hook(lambda module, inputs, hidden: hidden.to(dtype))
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        handle.remove()


def whole_hidden(hidden: Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """``[s, b, hidden]`` on each tensor-parallel rank, from the decoder's output; gradients of ranks are summed."""
    if group.size() == 1:
        return hidden
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
    return _SumGradient.apply(hidden, group)


class _SumGradient(torch.autograd.Function):
    """Identity; the gradient is summed over the group.

    Megatron's `copy_to_tensor_model_parallel_region` is not used: its `_reduce` sums a contiguous copy and returns the
    tensor it was given, so a transposed gradient (padded rows, more than one) would stay a partial sum.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
