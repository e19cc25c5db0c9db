"""`Topology`: which ranks share a node, so that a plan can prefer the fast links inside one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Rank -> node. Give either ``ranks_per_node`` (consecutive ranks, as torchrun starts them) or the map ``nodes``;
    with neither, all ranks share one node."""

    ranks_per_node: int = 0
    nodes: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        if self.ranks_per_node < 0 or (self.ranks_per_node and self.nodes is not None):
            raise ValueError(
                f"topology of ranks_per_node={self.ranks_per_node}, nodes={self.nodes}: expected a positive number of "
                f"ranks per node, or a rank -> node map, not both"
            )

    def node(self, rank: int) -> int:
        """The node of ``rank``.

        Raises:
            ValueError: ``rank`` is missing from the rank -> node map.
        """
        if self.nodes is not None:
            if rank not in self.nodes:
                raise ValueError(f"rank {rank} has no node: the topology names ranks {sorted(self.nodes)}")
            return self.nodes[rank]
        return rank // self.ranks_per_node if self.ranks_per_node else 0
