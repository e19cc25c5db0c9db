"""The command line, ``megatron-rl`` and ``python -m megatron_rl``."""

from megatron_rl.cli.app import main

__all__ = ["main"]
