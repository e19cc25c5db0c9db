"""The commands. Each is a thin shell: it reads the environment, calls one function and words its errors.

Heavy imports happen inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from megatron_rl.config import ConfigError
from megatron_rl.log import configure_logging

app = typer.Typer(
    help="Reinforcement learning for the Megatron-Core job you already run. Start `train` with torchrun for more than "
    "one process; everything also runs on a laptop without a GPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

TRAIN_EPILOG = """
**Examples**

One process: `megatron-rl train CONFIG`

Four processes: `torchrun --nproc-per-node 4 -m megatron_rl train CONFIG parallel.tp=2 parallel.pp=2`

Two nodes of 8, the same command on each; restarted runs continue from the newest complete checkpoint:
`torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint HOST:29500
-m megatron_rl train CONFIG`
"""


@app.command(epilog=TRAIN_EPILOG)
def train(
    config: Annotated[Path, typer.Argument(help="YAML file; every key is documented in megatron_rl/run/config.py.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, over the file.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the configuration, print it, and stop.")] = False,
) -> None:
    """Train as a YAML file says."""
    rank = int(os.environ.get("RANK", "0"))
    with _clear_errors(rank):
        from megatron_rl.config.files import load_config
        from megatron_rl.run.config import RunConfig

        run = load_config(RunConfig, config, overrides or [])
        configure_logging(rank, run.log_level)
        if check:
            typer.echo(run.model_dump_json(indent=2))
            return
        from megatron_rl.run.execute import execute

        execute(run)


@app.command()
def info() -> None:
    """Show versions, devices, and which accelerated parts are in use, and why not."""
    with _clear_errors(0):
        from megatron_rl.run.environment import describe_environment

        typer.echo(describe_environment())


@contextlib.contextmanager
def _clear_errors(rank: int) -> Iterator[None]:
    """Mistakes of the user as one line and exit code 2, on every rank; anything else keeps its traceback."""
    from megatron_rl.rewards import RewardError

    try:
        yield
    except (ConfigError, RewardError) as error:
        sys.stdout.flush()
        typer.echo(f"[rank {rank}] {type(error).__name__}: {error}", err=True)
        sys.stderr.flush()
        # Not sys.exit: at interpreter shutdown the process group would wait for ranks that may hang in a collective.
        os._exit(2)


def main() -> None:
    """Entry point of the console script."""
    app()
