"""`Variant`: a layout and micro-batching of the update; and the list of those that the doctor compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.parallel import ParallelSizes

BASE = "one process"


@dataclass(frozen=True, eq=False)  # each is its own key
class Variant:
    """A layout, and how its batches become micro-batches."""

    name: str
    axis: str  # what it tests: "dp", "cp", "tp", "pp", "ep", "micro-batch", "packing"
    ranks: int = 1
    sizes: dict[str, Any] = field(default_factory=dict)  # of `ParallelSizes`
    worker: dict[str, Any] = field(default_factory=dict)  # of `ActorConfig`


SMALL = {"token_budget": 40}  # about two of the sequences
PADDED = {"packing": False, "micro_batch_size": 64}

VARIANTS = (
    Variant(BASE, "base"),
    Variant("small micro-batches", "micro-batch", worker=SMALL),
    Variant("padded rows", "packing", worker=PADDED),
    Variant("padded rows, 2 a micro-batch", "micro-batch", worker={"packing": False, "micro_batch_size": 2}),
    Variant("DP2", "dp", 2),
    Variant("DP2, small micro-batches", "dp", 2, worker=SMALL),
    Variant("CP2", "cp", 2, {"cp": 2}),
    Variant("CP2, padded rows", "cp", 2, {"cp": 2}, PADDED),
    Variant("TP2", "tp", 2, {"tp": 2}),
    Variant("TP2, sequence parallel", "tp", 2, {"tp": 2, "sequence_parallel": True}),
    Variant("PP2", "pp", 2, {"pp": 2}),
    Variant("PP2, small micro-batches", "pp", 2, worker=SMALL, sizes={"pp": 2}),
    Variant("PP2 VPP2", "pp", 2, {"pp": 2, "vpp": 2}),
    Variant("EP2", "ep", 2, {"ep": 2}),
    Variant("TP2 PP2", "tp", 4, {"tp": 2, "pp": 2}),
    Variant("CP2 DP2", "cp", 4, {"cp": 2}, SMALL),
)


def variants_for(max_ranks: int, has_experts: bool, data_parallel: bool = False) -> dict[int, list[Variant]]:
    """World size -> the variants that run in it.

    Args:
        max_ranks: largest number of processes; at least 2.
        has_experts: tensor parallelism then comes with sequence parallelism, and expert parallelism is among them.
        data_parallel: only layouts without any other parallelism, of several ranks one: FSDP2 keeps the process groups
            of the first, which are gone when the next one is made.

    Raises:
        ConfigError: fewer than 2 processes.
    """
    if max_ranks < 2:
        raise ConfigError(f"ranks={max_ranks}: layouts of several processes need at least 2")
    found: dict[int, list[Variant]] = {}
    for variant in VARIANTS:
        sizes = ParallelSizes(**variant.sizes)
        fits = sizes.ep == 1
        if has_experts:
            fits = sizes.tp == 1 or sizes.sequence_parallel
        if data_parallel:
            fits = not variant.sizes and (variant.ranks == 1 or not variant.worker)
        if fits and variant.ranks <= max_ranks:
            found.setdefault(variant.ranks, []).append(variant)
    return found
