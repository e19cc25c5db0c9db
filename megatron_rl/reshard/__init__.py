"""Carrying weights between layouts: a layout is data, a plan is the intersection of two layouts.

`ReshardPlan(source, target)` is an inspectable value (``print(plan.certificate())``); `Resharder` runs one rank's part.
"""

from megatron_rl.reshard.certificate import Certificate, Measure
from megatron_rl.reshard.derived import Derived, Readable, shifted
from megatron_rl.reshard.execute import Resharder, TransferReport
from megatron_rl.reshard.layout import Alike, Held, Layout, Shard, Span, block, stack_rows
from megatron_rl.reshard.link_load import LinkLoad, LinkSpeeds, link_load
from megatron_rl.reshard.plan import LocalCopy, RankPlan, ReshardPlan, Transfer, plan_transfers
from megatron_rl.reshard.topology import Topology
from megatron_rl.reshard.transport import (
    LocalTransport,
    MemoryHub,
    MemoryTransport,
    P2PTransport,
    Transport,
    TransportError,
)
from megatron_rl.reshard.wire import WireFormat

__all__ = [
    "Alike",
    "Certificate",
    "Derived",
    "Held",
    "Layout",
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
    "Topology",
    "Transfer",
    "TransferReport",
    "Transport",
    "TransportError",
    "WireFormat",
    "block",
    "link_load",
    "plan_transfers",
    "shifted",
    "stack_rows",
]
