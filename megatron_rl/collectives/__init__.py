"""Reductions of gradients over data-parallel ranks: the fastest path for each message, one result to the bit.

`HybridAllReduce` is the engine, `HybridProcessGroup` the same as a process group of torch.distributed.
"""

from megatron_rl.collectives.hybrid import HybridAllReduce
from megatron_rl.collectives.node_memory import CollectiveError
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.policy import CollectivesConfig
from megatron_rl.collectives.process_group import HybridProcessGroup, register_backend

__all__ = [
    "CollectiveError",
    "CollectivesConfig",
    "HybridAllReduce",
    "HybridProcessGroup",
    "NodeMap",
    "register_backend",
]
