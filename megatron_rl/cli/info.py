"""``megatron-rl info``: versions, devices and accelerated parts of this installation."""

from __future__ import annotations

import typer

from megatron_rl.cli.errors import clear_errors


def info() -> None:
    """Show versions, devices, and which accelerated parts are in use, and why not."""
    with clear_errors():
        from megatron_rl.run.environment import describe_environment

        typer.echo(describe_environment())
