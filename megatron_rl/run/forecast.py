"""`forecast`: the cost of a weight sync on any cluster, computed without it: bytes, link loads, memory and time.

The same layouts and the same planner as in a run, so the bytes are exactly those of the run; only the seconds are
an estimate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.engines.trained_layout import trained_layout
from megatron_rl.models import Architecture, rollout_layout
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard import (
    Certificate,
    Layout,
    LinkLoad,
    LinkSpeeds,
    ReshardPlan,
    Topology,
    WireFormat,
    link_load,
)
from megatron_rl.reshard.certificate import certify
from megatron_rl.rollout.placement import RolloutPlacement
from megatron_rl.weights.sync import MAX_STAGING_BYTES

MIB = 1 << 20


class RolloutSizes(ConfigRecord):
    """Sizes of one rollout engine."""

    tp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks."""
    ep: int = Field(default=1, ge=1)
    """Expert-parallel ranks among them (MoE only)."""


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal size. Training takes the first; engines share its ranks, or take nodes of their own after them."""

    train_nodes: int
    rollout_nodes: int = 0  # 0: engines live on the training ranks
    ranks_per_node: int = 8

    def __post_init__(self) -> None:
        if self.train_nodes < 1 or self.rollout_nodes < 0 or self.ranks_per_node < 1:
            raise ConfigError(f"{self}: expected at least one training node and one rank in it")

    @property
    def train_ranks(self) -> int:
        return self.train_nodes * self.ranks_per_node

    @property
    def rollout_ranks(self) -> range:
        return range(self.train_ranks, self.train_ranks + self.rollout_nodes * self.ranks_per_node)


@dataclass(frozen=True)
class Forecast:
    """One weight sync before it happens. Written by `forecast`."""

    certificate: Certificate
    load: LinkLoad
    speeds: LinkSpeeds
    num_replicas: int  # rollout engines
    train_bytes: int  # of the weights of the fullest training rank, in the rollout's dtype
    rollout_bytes: int  # of the shards of one rollout rank
    max_staging_bytes: int

    @property
    def seconds(self) -> float:
        return self.load.seconds(self.speeds)

    def to_json(self) -> dict[str, Any]:
        """Plain data: bytes as whole numbers, seconds as floats; ``minimum`` is the lower bound of ``bytes``."""
        c = self.certificate
        measures = {
            name: {"bytes": measure.actual, "minimum": measure.lower_bound}
            for name, measure in (
                ("received", c.received),
                ("inter_node", c.inter_node),
                ("sent_by_holders", c.holder_egress),
                ("busiest_holder", c.max_holder_egress),
            )
        }
        return {
            "plan": c.name,
            "covered_elements": c.elements,
            "resident_bytes": c.resident,
            **measures,
            "links": dataclasses.asdict(self.load),
            "replicas": self.num_replicas,
            "memory": {
                "train_bytes": self.train_bytes,
                "rollout_bytes": self.rollout_bytes,
                "max_staging_bytes": self.max_staging_bytes,
            },
            "estimated_s": self.seconds,
            "speeds": dataclasses.asdict(self.speeds),
        }

    def __str__(self) -> str:
        load, speeds = self.load, self.speeds
        return "\n".join(
            [
                str(self.certificate),
                "",
                f"{'busiest rank':18}{'sends':>20}  {'receives':>20}",
                f"{'inside its node':18}{load.intra_sent:>20,}  {load.intra_received:>20,}",
                f"{'to other nodes':18}{load.inter_sent:>20,}  {load.inter_received:>20,}",
                "",
                f"{self.num_replicas} rollout engines; memory of a rank: up to {_mib(self.train_bytes)} of weights in "
                f"training, {_mib(self.rollout_bytes)} in the engine, up to {_mib(self.max_staging_bytes)} of staging",
                f"estimated time: {self.seconds:.3f} s, at {speeds.intra_node / 1e9:g} GB/s inside a node and "
                f"{speeds.inter_node / 1e9:g} GB/s between nodes, for each rank and direction",
            ]
        )


def forecast(
    architecture: Architecture,
    train: ParallelSizes,
    rollout: RolloutSizes,
    cluster: Cluster,
    dtype: torch.dtype = torch.bfloat16,
    max_staging_bytes: int = MAX_STAGING_BYTES,
    speeds: LinkSpeeds | None = None,
) -> Forecast:
    """Plan the sync of every rank of ``cluster`` on this one; of a model without a family from FSDP2's shards.

    Args:
        dtype: of the rollout weights, and so of the bytes sent.

    Raises:
        ConfigError: the sizes fit neither the model nor the cluster.
    """
    grid = RankGrid(train, cluster.train_ranks)
    replicas = _replicas(grid, rollout, cluster)
    source = trained_layout(architecture, grid)
    target = rollout_layout(architecture, rollout.tp, replicas, rollout.ep)
    plan = ReshardPlan(source, target, Topology(cluster.ranks_per_node))
    certificate = certify(plan, WireFormat(dtype))
    some_engine_rank = next(iter(target.replicas))  # all hold shards of the same shapes
    return Forecast(
        certificate=certificate,
        load=link_load(certificate),
        speeds=speeds or LinkSpeeds(),
        num_replicas=len(replicas),
        train_bytes=max(_num_bytes(source, replica, dtype) for replica in source.replicas),
        rollout_bytes=_num_bytes(target, some_engine_rank, dtype),
        max_staging_bytes=max_staging_bytes,
    )


def _replicas(grid: RankGrid, rollout: RolloutSizes, cluster: Cluster) -> list[Sequence[int]]:
    if not cluster.rollout_nodes:
        placements = [RolloutPlacement(ranks, rollout.tp) for ranks in grid.partition("dp")]
        return [replica for placement in placements for replica in placement.replicas]
    ranks = cluster.rollout_ranks
    if rollout.tp < 1 or len(ranks) % rollout.tp:
        raise ConfigError(
            f"rollout tp={rollout.tp} does not divide the {len(ranks)} ranks of {cluster.rollout_nodes} rollout nodes: "
            f"choose a divisor of {len(ranks)}"
        )
    return [ranks[start : start + rollout.tp] for start in range(0, len(ranks), rollout.tp)]


def _num_bytes(layout: Layout, replica: Any, dtype: torch.dtype) -> int:
    return sum(math.prod(shard.shape) for shard in layout.shards_of(replica)) * dtype.itemsize


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.1f} MiB"
