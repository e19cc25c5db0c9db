"""The command line as tests call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import forked
import pytest

TESTS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line; fails when there is none, more than one, or a traceback."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("[rank ")]
        assert len(lines) == 1, self.err
        return lines[0]


Command = Callable[..., Ended]


@pytest.fixture(scope="session")
def command() -> Command:
    """``command("train", config, "parallel.tp=2", WORLD_SIZE=4)`` in a process of its own."""
    path = f"{TESTS.parent}:{TESTS / 'run'}"

    def run(*arguments: object, **variables: object) -> Ended:
        given = {name: str(value) for name, value in variables.items()}
        ended = forked.run_forked("-m", "megatron_rl", *arguments, timeout=120, PYTHONPATH=path, **given)
        return Ended(ended.code, ended.out, ended.err)

    return run
