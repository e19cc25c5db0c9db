"""The last hidden states of any Megatron model, without its logits.

Logits over a whole vocabulary are the largest tensor of a training step. `hidden_states` makes a model return what
goes into its output layer instead, and `ops.token_logprobs` computes log-probabilities from there in chunks:

    with hidden_states(chunk):
        hidden = chunk(input_ids, position_ids, None, packed_seq_params=packed)     # [b, s, hidden]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from megatron_rl.models.chunk import unwrap


@contextlib.contextmanager
def hidden_states(chunk: nn.Module) -> Iterator[None]:
    """Within this context the forward of the last chunk returns hidden states ``[b, s, hidden]`` in place of logits.

    They are whole on each tensor-parallel rank, and each rank's gradient is a partial sum (what its part of the
    vocabulary contributes): the sum over the ranks is taken in the backward pass, as it is for logits. Chunks that are
    not last are left as they are. Only the forward has to lie inside the context.
    """
    model = unwrap(chunk)
    if not model.post_process:
        yield
        return
    layer, group = model.output_layer, model.pg_collection.tp
    sequence_parallel = model.config.sequence_parallel

    def forward(hidden: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        return whole_hidden(hidden, group, sequence_parallel), None

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def whole_hidden(hidden: Tensor, group: dist.ProcessGroup, sequence_parallel: bool) -> Tensor:
    """``[s, b, hidden]`` on each tensor-parallel rank, from the decoder's output; gradients of ranks are summed."""
    if group.size() == 1:
        return hidden
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
    return copy_to_tensor_model_parallel_region(hidden, group=group)
