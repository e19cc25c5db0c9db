"""The parallel sizes that FSDP2 takes; known without loading it."""

from __future__ import annotations

from megatron_rl.config import ConfigError
from megatron_rl.parallel import ParallelSizes


def require_data_parallel(sizes: ParallelSizes) -> None:
    """Raise ConfigError for sizes with more than data parallelism."""
    if (sizes.tp, sizes.pp, sizes.cp, sizes.ep) != (1, 1, 1, 1):
        raise ConfigError(
            f"backend fsdp2 is data parallel only, but the layout is {sizes}: set tp, pp, cp and ep to 1, or choose a "
            "model of a family that Megatron-Core trains here"
        )
