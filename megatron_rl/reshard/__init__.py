"""Carrying weights between layouts: a layout is data, a plan is the intersection of two layouts.

`ReshardPlan(source, target)` is an inspectable value (``print(certify(plan))``); `Resharder` runs one rank's part.
"""

from megatron_rl.reshard.certificate import Certificate, Measure, certify
from megatron_rl.reshard.layout import Held, Layout, Shard, Span, Symmetry, block, stack_rows
from megatron_rl.reshard.lazy_tensor import LazyTensor, Readable, shifted
from megatron_rl.reshard.link_load import LinkLoad, LinkSpeeds, link_load
from megatron_rl.reshard.plan import LocalCopy, RankPlan, ReshardPlan, Transfer
from megatron_rl.reshard.resharder import Resharder, TransferReport
from megatron_rl.reshard.topology import Topology
from megatron_rl.reshard.transport import (
    LocalTransport,
    MemoryHub,
    MemoryTransport,
    P2PTransport,
    Transport,
    TransportError,
)
from megatron_rl.reshard.wire_format import WireFormat

__all__ = [
    "Certificate",
    "Held",
    "Layout",
    "LazyTensor",
    "LinkLoad",
    "LinkSpeeds",
    "LocalCopy",
    "LocalTransport",
    "Measure",
    "MemoryHub",
    "MemoryTransport",
    "P2PTransport",
    "RankPlan",
    "Readable",
    "ReshardPlan",
    "Resharder",
    "Shard",
    "Span",
    "Symmetry",
    "Topology",
    "Transfer",
    "TransferReport",
    "Transport",
    "TransportError",
    "WireFormat",
    "block",
    "certify",
    "link_load",
    "shifted",
    "stack_rows",
]
