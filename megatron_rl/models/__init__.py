"""Model families as data, and the Megatron-Core models built from them."""

from megatron_rl.models.architecture import Architecture

__all__ = ["Architecture"]
