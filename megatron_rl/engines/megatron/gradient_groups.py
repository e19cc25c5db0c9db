"""Hybrid process groups for Megatron's data-parallel gradients, without patching Megatron.

DDP reduces each bucket over the group that its bucket group holds, and the distributed optimizer gathers parameters
over the same one. Both, of a job's own chunks as well, get a group of the same ranks whose reductions take the fastest
path (`collectives.HybridProcessGroup`).
"""

from __future__ import annotations

import itertools
import logging
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.collectives import CollectivesConfig, register_backend
from megatron_rl.config import ConfigError
from megatron_rl.parallel import ParallelContext
from megatron_rl.parallel.groups import own_group, ranks_of

logger = logging.getLogger(__name__)

# Where a bucket group of megatron.core.distributed holds its group: with the distributed optimizer, and without.
BUCKET_GROUPS = ("bucket_groups", "expert_parallel_bucket_groups")
HOLDERS = ("intra_distributed_optimizer_instance_group", "data_parallel_group")


def use_hybrid_groups(
    chunks: Sequence[torch.nn.Module], context: ParallelContext, config: CollectivesConfig, timeout: float = 1800.0
) -> None:
    """Reduce the gradients of DDP-wrapped ``chunks`` over hybrid groups; collective over the world.

    Raises:
        ConfigError: a link is none of this machine's interfaces, or the chunks reduce over other ranks than all that
            are data parallel (several instances of the distributed optimizer).
    """
    with context.attempt("looking for the links"):
        _require_links(config.links)
    backend = register_backend(config)
    partitions = [context.grid.partition("tp", "pp")]
    if any(True for _ in _bucket_groups(chunks, BUCKET_GROUPS[1])):
        partitions.append(context.grid.partition("etp", "ep", "pp"))
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for partition in partitions:
        if len(partition[0]) > 1:
            group = own_group(partition, backend, timeout)
            made[ranks_of(group)] = group
    for bucket_group in itertools.chain.from_iterable(_bucket_groups(chunks, name) for name in BUCKET_GROUPS):
        for holder in HOLDERS:
            held = getattr(bucket_group, holder, None)
            if held is None or held.size() == 1:
                continue
            if ranks_of(held) not in made:
                raise ConfigError(
                    f"collectives.all_reduce=hybrid, but gradients are reduced over ranks {list(ranks_of(held))} only: "
                    "set num_distributed_optimizer_instances to 1, or collectives.all_reduce to library"
                )
            setattr(bucket_group, holder, made[ranks_of(held)])
    logger.info("gradients are reduced over hybrid groups of %s ranks", sorted({len(ranks) for ranks in made}))


def _require_links(links: Sequence[str]) -> None:
    known = [name for _, name in socket.if_nameindex()]
    if missing := [name for name in links if name not in known]:
        raise ConfigError(
            f"collectives.links has {', '.join(missing)}, but {socket.gethostname()} has the interfaces "
            f"{', '.join(known)}: name some of these"
        )


def _bucket_groups(chunks: Sequence[torch.nn.Module], name: str) -> Iterator[Any]:
    for chunk in chunks:
        yield from getattr(chunk, name, ())
