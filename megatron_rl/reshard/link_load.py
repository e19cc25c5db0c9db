"""`LinkLoad`: what a certified plan puts on the busiest links, and the least time in which given links carry it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rl.reshard.certificate import Certificate
from megatron_rl.reshard.resharder import MAX_CHUNK_BYTES

GB = 10**9


@dataclass(frozen=True)
class LinkSpeeds:
    """Of one rank, in bytes a second and direction; links are full duplex.

    The defaults are round figures of a node with eight GPUs, NVLink inside and one 400 Gbit/s port for each GPU.
    """

    intra_node: float = 400 * GB
    inter_node: float = 50 * GB

    def __post_init__(self) -> None:
        if min(self.intra_node, self.inter_node) <= 0:
            raise ValueError(f"{self}: link speeds must be positive")


@dataclass(frozen=True)
class LinkLoad:
    """Bytes of the busiest rank on each kind of link. Written by `link_load`."""

    intra_sent: int
    intra_received: int
    inter_sent: int
    inter_received: int
    max_depth: int  # hops of the longest chain

    def seconds(self, speeds: LinkSpeeds, chunk_bytes: int = MAX_CHUNK_BYTES) -> float:
        """The time that the busiest link needs, and what a chain's last rank waits for its first chunk.

        Packing and unpacking are left out, as they overlap with the transfer; so are latencies, and links that several
        ranks share.
        """
        busiest = max(
            max(self.intra_sent, self.intra_received) / speeds.intra_node,
            max(self.inter_sent, self.inter_received) / speeds.inter_node,
        )
        if not busiest:
            return 0.0
        slowest = speeds.inter_node if self.inter_sent else speeds.intra_node
        return busiest + (self.max_depth - 1) * chunk_bytes / slowest


def link_load(certificate: Certificate) -> LinkLoad:
    """The busiest rank's bytes, each direction and kind of link by itself."""
    c = certificate
    return LinkLoad(
        intra_sent=max((c.sent[rank] - c.sent_outside[rank] for rank in c.sent), default=0),
        intra_received=max((c.received_by[rank] - c.received_outside[rank] for rank in c.sent), default=0),
        inter_sent=max(c.sent_outside.values(), default=0),
        inter_received=max(c.received_outside.values(), default=0),
        max_depth=c.max_depth,
    )
