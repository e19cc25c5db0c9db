"""Three ways of bringing a training job's weights into another layout, for `bench_reshard.py`: ours, gathering, theirs.

Each way is made once and run many times, and counts the bytes that this rank receives from other ranks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.parallel import ParallelContext
from megatron_rl.reshard import Layout, P2PTransport, Resharder, Shard
from megatron_rl.reshard.transport import Pending

import megatron.core.resharding.refit as refit  # isort: skip  (after megatron_rl: the CPU face)
from megatron.core.models.gpt import GPTModel  # isort: skip
from megatron.core.resharding.copy_services.gloo_copy_service import GlooCopyService  # isort: skip


class Way(ABC):
    """One way of moving weights."""

    received_bytes = 0  # by this rank in the last run

    @abstractmethod
    def run(self) -> None:
        """Fill the target tensors. Collective."""


class CountingTransport(P2PTransport):
    """Counts what arrives."""

    received_bytes = 0

    def exchange(self, peer: int, send: Tensor | None, receive: Tensor | None) -> Pending:
        self.received_bytes += 0 if receive is None else receive.nbytes
        return super().exchange(peer, send, receive)


class Planned(Way):
    """`megatron_rl.reshard`: each rank receives what it lacks, and nothing else."""

    def __init__(
        self, source: Layout, target: Layout, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]
    ) -> None:
        self._transport = CountingTransport()
        self._resharder = Resharder(source, target, dist.get_rank(), self._transport)
        self._tensors, self._into = tensors, into

    def run(self) -> None:
        self._transport.received_bytes = 0
        self._resharder.run(self._tensors, self._into)
        self.received_bytes = self._transport.received_bytes


class Gathered(Way):
    """Parameter by parameter: gathered over tensor-parallel ranks, broadcast over pipeline stages, named and cut as
    Hugging Face files are, and sliced by each receiver.

    So do slime (backends/megatron_utils/update_weight: all_gather_param, then a broadcast over stages) and verl
    (per_tensor_generator). Neither keeps more than a bucket of full tensors; here it is one parameter, in two buffers.
    """

    def __init__(
        self,
        context: ParallelContext,
        source: Layout,
        target: Layout,
        tensors: Mapping[str, Tensor],
        into: Mapping[str, Tensor],
        dtype: torch.dtype = torch.bfloat16,
        keep_buffers: bool = True,
    ) -> None:
        self._context, self._tensors, self._into = context, tensors, into
        self._dtype, self._keep_buffers = dtype, keep_buffers
        grid, at = context.grid, context.coordinates
        self._pp_ranks = grid.ranks(dp=at.dp, tp=at.tp, cp=at.cp)
        self._stages = [
            [source.shards(rank) for rank in grid.ranks(dp=at.dp, cp=at.cp, pp=stage)] for stage in range(grid.sizes.pp)
        ]
        self._wanted: dict[str, list[tuple[Shard, int]]] = defaultdict(list)
        for shard in target.shards(dist.get_rank()):
            for number, span in enumerate(shard.spans):
                self._wanted[span.tensor].append((shard, number))
        every = [shards for ranks in self._stages for shards in zip(*ranks, strict=True)]
        self._largest = max(sum(math.prod(shard.shape) for shard in shards) for shards in every)
        self._buffers: tuple[Tensor, ...] = ()

    def run(self) -> None:
        self.received_bytes = 0
        self._buffers = self._buffers or tuple(torch.empty(self._largest, dtype=self._dtype) for _ in range(2))
        for stage, ranks in enumerate(self._stages):
            for shards in zip(*ranks, strict=True):  # the same parameter on each tensor-parallel rank
                self._slice(shards, self._gather(stage, shards))
        if not self._keep_buffers:
            self._buffers = ()

    def _gather(self, stage: int, shards: Sequence[Shard]) -> list[Tensor]:
        context, replicated = self._context, all(shard.spans == shards[0].spans for shard in shards)
        count = 1 if replicated else len(shards)
        shape = (count, *shards[0].shape)
        full = self._buffers[0][: math.prod(shape)].view(shape)
        if context.coordinates.pp == stage:
            mine = self._tensors[shards[context.coordinates.tp].name]
            if replicated:
                full[0].copy_(mine)
            else:
                dist.all_gather(list(full.unbind()), mine, group=context.collection.tp)
                self.received_bytes += full.nbytes - mine.nbytes
        if len(self._stages) > 1:
            dist.broadcast(full, self._pp_ranks[stage], group=context.collection.pp)
            self.received_bytes += full.nbytes if context.coordinates.pp != stage else 0
        return list(full.unbind())

    def _slice(self, shards: Sequence[Shard], parts: Sequence[Tensor]) -> None:
        logical: dict[str, list[tuple[int, int, Tensor]]] = defaultdict(list)
        for shard, part in zip(shards, parts, strict=False):  # a replicated parameter has one part
            matrix = part.view(shard.matrix_shape)
            for span in shard.spans:
                rows = slice(span.row, span.row + span.num_rows)
                cols = slice(span.col, span.col + span.num_cols)
                logical[span.tensor].append((span.row_start, span.col_start, matrix[rows, cols]))
        for name, pieces in logical.items():
            num_rows = max(row + piece.shape[0] for row, _, piece in pieces)
            num_cols = max(col + piece.shape[1] for _, col, piece in pieces)
            full = self._buffers[1][: num_rows * num_cols].view(num_rows, num_cols)
            for row, col, piece in pieces:
                full[row : row + piece.shape[0], col : col + piece.shape[1]] = piece
            for shard, number in self._wanted[name]:
                span = shard.spans[number]
                into = self._into[shard.name].view(shard.matrix_shape)
                into[span.row : span.row + span.num_rows, span.col : span.col + span.num_cols] = full[
                    span.row_start : span.row_stop, span.col_start : span.col_stop
                ]


class _CountingGloo(GlooCopyService):
    """Counts what comes from other ranks."""

    received_bytes = 0

    def submit_recv(self, dest_tensor: Tensor, src_rank: int) -> None:
        self.received_bytes += dest_tensor.nbytes if src_rank != self.rank else 0
        super().submit_recv(dest_tensor, src_rank)

    def submit_recv_with_id(self, task_id: int, dest_tensor: Tensor, src_rank: int) -> None:
        self.received_bytes += dest_tensor.nbytes if src_rank != self.rank else 0
        super().submit_recv_with_id(task_id, dest_tensor, src_rank)


class MegatronCore(Way):
    """`megatron.core.resharding` with its gloo service, from one Megatron model into another."""

    def __init__(self, source: GPTModel, target: GPTModel) -> None:
        self._source, self._target, self._service = source, target, _CountingGloo()

    def run(self) -> None:
        self._service.received_bytes = 0
        refit.swap_model_weights(self._source, self._target, self._service)
        self.received_bytes = self._service.received_bytes
