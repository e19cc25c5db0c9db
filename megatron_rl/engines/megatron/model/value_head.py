"""`ValueHead`: the output layer of critics and reward models, which maps hidden states to one value per position."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class ValueHead(MegatronModule):
    """A linear map ``hidden -> 1`` without bias, replicated over the tensor-parallel ranks.

    It starts at zero, so that first values are 0 on every layout. Called as Megatron calls an output layer; values are
    fp32, ``[s, b, 1]``, whole on each tensor-parallel rank.
    """

    def __init__(self, config: TransformerConfig, tp_group: dist.ProcessGroup, beside_logits: bool = False) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        # Beside logits it sees all positions on every rank, so its gradient is complete everywhere.
        self.sequence_parallel = config.sequence_parallel and tp_group.size() > 1 and not beside_logits
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        # `finalize_model_grads` then sums the weight's gradient over ranks that saw different positions.
        self.weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """``[s or s / tp, b, hidden] -> [s, b, 1]``; the other arguments are those of an output layer, and unused."""
        values = torch.nn.functional.linear(hidden.float(), self.weight.float())
        if self.sequence_parallel:
            # Every rank computes the same loss from the whole values, so each takes its own slice of the gradient.
            values = gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=self.tp_group
            )
        return values, None

    def beside_logits(self, hidden: Tensor) -> Tensor:
        """``[n, hidden] -> [n]`` where the output layer is the vocabulary's, from the whole hidden states of
        `hidden_states.py`: their gradients are summed over the tensor-parallel ranks, so each gives its share."""
        shared = _Share.apply(hidden, self.tp_group.size())
        return torch.nn.functional.linear(shared.float(), self.weight.float()).squeeze(-1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """The weight as one replicated tensor of a distributed checkpoint."""
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {})["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets, **groups
        )


class _Share(torch.autograd.Function):
    """Identity; the gradient is divided by a number."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, size: int) -> Tensor:
        ctx.size = size
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None
