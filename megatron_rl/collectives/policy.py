"""`CollectivesConfig`: how gradients are reduced over data-parallel ranks."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_rl.config import ConfigRecord


class CollectivesConfig(ConfigRecord):
    """The path of gradient reductions."""

    all_reduce: Literal["library", "hybrid"] = "library"
    """library = NCCL or gloo as it is; hybrid = per message the fastest of it and host-staged hierarchical paths."""
    deterministic: bool = False
    """Only paths whose sums have one fixed order: the same bits on every path, chunk size and run."""
    links: tuple[str, ...] = ()
    """Network interfaces to other nodes, the same names on each, each once; () = gloo's choice (GLOO_SOCKET_IFNAME)."""
    wire_dtype: Literal["same", "bfloat16"] = "same"
    """What travels between nodes: same = the tensor's dtype; bfloat16 = rounded, sums still in fp32."""
    error_feedback: bool = False
    """With wire_dtype=bfloat16: what rounding left out is added to the next reduction of the same buffer."""
    chunk_mb: float = Field(default=2.0, gt=0, le=1024)
    """MB of the largest pieces in which messages go through a node's memory, which is 2 of them a rank and 5 more."""
    minimum_gain: float = Field(default=0.1, ge=0, lt=1)
    """Share of the library's time that another path must be predicted to save before it is taken."""
    reuse_calibration: bool = True
    """Take the costs that an earlier run measured on the same nodes; measured again where they are wrong."""
    timeout_seconds: float = Field(default=30.0, gt=0, le=86400)
    """Seconds after which an exchange of a chunk over a link counts as failed; nodes agree within 8 times that."""

    @model_validator(mode="after")
    def _links_once(self) -> Self:
        if twice := sorted({link for link in self.links if self.links.count(link) > 1}):
            raise ValueError(f"links has {', '.join(twice)} more than once: name each interface once")
        return self
