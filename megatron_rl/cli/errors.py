"""Errors of the commands: the user's mistakes as one line, anything else with its traceback."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Iterator

import typer

from megatron_rl.config.credentials import masked
from megatron_rl.devices.launch import LaunchError, join_launcher

FULL_DISK = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
EXIT_CODE = 2  # of a mistake in configuration, data or user code


@contextlib.contextmanager
def clear_errors(rank: int = 0) -> Iterator[None]:
    """Print a mistake of the user as one line, on every rank that meets it, and end this process with `EXIT_CODE`.

    Any other exception ends it with its traceback and code 1. Credentials are masked in both.
    """
    try:
        yield
    except Exception as error:
        full = any(reason in str(error) for reason in FULL_DISK)
        if not isinstance(error, mistakes()) and not full:
            typer.echo(masked(traceback.format_exc()), err=True)
            raise SystemExit(1) from None
        sys.stdout.flush()
        kind = "disk full" if full and isinstance(error, OSError) else type(error).__name__
        typer.echo(f"[rank {rank}] {kind}: {masked(' '.join(str(error).split()))}", err=True)
        sys.stderr.flush()
        # Not sys.exit: at interpreter shutdown the process group would wait for ranks that may hang in a collective.
        os._exit(EXIT_CODE)


def mistakes() -> tuple[type[Exception], ...]:
    """The exceptions that are printed as their message alone."""
    from megatron_rl.algorithms.pack_samples import NotFiniteError
    from megatron_rl.config import ConfigError
    from megatron_rl.data import DataError
    from megatron_rl.dataflow.flow import FlowError
    from megatron_rl.devices.launch import LaunchError
    from megatron_rl.ops.selection import UnavailableError
    from megatron_rl.parallel.agreement import PeerError, TransportError
    from megatron_rl.rewards import RewardError
    from megatron_rl.trainer.restart_point import CheckpointError

    common = (ConfigError, DataError, FlowError, RewardError, UnavailableError, PeerError, LaunchError)
    return *common, CheckpointError, NotFiniteError, FloatingPointError, TransportError


def environment_world_size() -> int | None:
    """World size given by torchrun, a scheduler or the user; None if nobody gives it."""
    given = os.environ.get("WORLD_SIZE", "")
    if not given:
        return None
    if not given.isdecimal() or not 1 <= int(given) < 2**31:
        raise LaunchError(f"WORLD_SIZE={given!r} in the environment is not a number of ranks: expected 1 or more")
    return int(given)


def environment_rank() -> int:
    """This process's rank as torchrun or a scheduler gave it; 0 without either."""
    with clear_errors():
        join_launcher()
    return int(os.environ.get("RANK", "0"))
