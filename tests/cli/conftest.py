"""The command line as tests call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


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
def command() -> Iterator[Command]:
    """``command("train", config, "parallel.tp=2")`` in a process of its own."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(PROJECT / "tests/run"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
    }
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forked_commands.py"))],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def run(*arguments: object) -> Ended:
        server.stdin.write(json.dumps({"arguments": [str(part) for part in arguments]}) + "\n")
        server.stdin.flush()
        return Ended(**json.loads(server.stdout.readline()))

    yield run
    server.stdin.close()
    server.wait(30)
