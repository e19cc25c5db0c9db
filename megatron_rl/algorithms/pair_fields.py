"""Fields of preference batches that are computed from both responses of a pair, or from all pairs of a step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.parallel.groups import gather_objects


def length_weights(batch: Batch, alpha: float) -> Tensor:
    """Weight of each token in LD-DPO, ``[num_tokens]`` fp32: 1 up to the length of the pair's shorter response,
    ``alpha`` beyond it (arXiv 2409.06411, section 4)."""
    mask = batch["response_mask"].clone()
    starts = batch.cu_seqlens[:-1]
    mask[starts[starts < mask.numel()]] = False  # nothing predicts a first token
    count = mask.long().cumsum(0)
    before = torch.cat([count.new_zeros(1), count])[batch.cu_seqlens]
    shorter = before.diff().view(-1, 2).amin(dim=1).repeat_interleave(2)
    inside = count - before[:-1][batch.sequence_ids] <= shorter[batch.sequence_ids]
    return torch.where(inside, 1.0, alpha)


def matched(values: Tensor, others: Tensor, present: Tensor) -> Tensor:
    """The k-th smallest of ``others`` for the k-th smallest of ``values``, ``[n]``: optimal transport in one dimension.
    Entries that are not ``present`` are left out and keep their own."""
    found = others.clone()
    order = values[present].argsort(stable=True)
    places = present.nonzero().squeeze(1)[order]
    found[places] = others[present].sort().values
    return found


def matched_over_ranks(values: Tensor, others: Tensor, present: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`matched` over the entries of all data-parallel ranks end to end; returns this rank's. Collective."""
    shares = gather_objects(torch.stack([values.double(), others.double(), present.double()]).tolist(), group)
    rank = 0 if group is None else group.rank()
    first = sum(len(share[0]) for share in shares[:rank])
    joined = torch.cat([torch.tensor(share, dtype=torch.float64).view(3, -1) for share in shares], dim=1)
    return matched(joined[0], joined[1], joined[2].bool())[first : first + len(values)].to(values.dtype)
