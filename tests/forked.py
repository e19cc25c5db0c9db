"""Programs of tests, run as ranks or alone in forks of one warm process: `run_ranks` in place of `run_torchrun`.

A rank starts in 0.05 s instead of 5 (see `warm_process.py`). Each worker of pytest-xdist has one warm process, started
by the first test that needs it and ended with the session.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchrun import ROOT, rank_environment

# Python and its libraries read these when they start, which the warm process has done.
READ_AT_START = (
    "PYTHON",
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "KMP_",
    "TORCH",
    "CUDA_",
    "HF_",
    "TRANSFORMERS_",
    "LD_",
    "MALLOC",
)


@dataclass(frozen=True)
class Ended:
    """How a program ended: code of the first rank that failed or 0, and what ranks wrote, one after another.

    Of standard error, that of the rank that failed first is the last.
    """

    code: int
    out: str
    err: str
    late: bool = False


@dataclass(frozen=True)
class Program:
    """What is to be run, as `run_forked` has it."""

    path: str
    arguments: list[str]
    nproc: int | None
    timeout: float
    directory: Path | None
    env: dict[str, str]

    def __post_init__(self) -> None:
        fixed = [key for key in self.env if key.startswith(READ_AT_START) and key != "PYTHONPATH"]
        started_with = fork_environment()
        changed = [key for key in fixed if self.env[key] != started_with.get(key)]
        if changed:
            raise ValueError(f"{changed} are read when a process starts, and forks have started: use run_torchrun")

    def request(self, folder: str) -> dict[str, Any]:
        """For the warm process; ``folder`` is for what the ranks write."""
        return {
            "program": self.path,
            "arguments": self.arguments,
            "nproc": self.nproc,
            "timeout": self.timeout,
            "environment": fork_environment() | self.env,
            "directory": str(self.directory or Path.cwd()),
            "folder": folder,
            "background": False,
        }


def collect(answer: dict[str, Any], folder: str) -> Ended:
    """How a program ended, with what its ranks wrote into ``folder``."""
    out, err = (
        [path.read_text(errors="replace") for path in sorted(Path(folder).glob(f"*.{name}"), key=rank_of)]
        for name in ("out", "err")
    )
    if err and answer["code"]:  # last, where one looks
        err.append(err.pop(min(answer["failed"], len(err) - 1)))
    return Ended(answer["code"], "".join(out), "".join(err), answer["late"])


def rank_of(file: Path) -> int:
    return int(file.stem)


class Background:
    """A program that runs beside the test, which ends with the block: see `start_forked`."""

    def __init__(self, warm: WarmProcess, program: Program) -> None:
        self._warm, self._program = warm, program
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        request = program.request(self._folder.name) | {"background": True}
        self._number: int | None = warm.ask(request, 60)["number"]

    def wait(self) -> Ended:
        """How it ended, at the latest when its time is over."""
        number, self._number = self._number, None
        answer = self._warm.ask({"wait_for": number}, self._program.timeout + 60)
        return collect(answer, self._folder.name)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: object) -> None:
        if self._number is not None:
            self._warm.ask({"end": self._number}, 60)
        self._folder.cleanup()


class WarmProcess:
    """The process that forks; one request at a time, beside those in the background."""

    def __init__(self) -> None:
        self.environment = fork_environment()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "warm_process.py")],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.cpu_seconds = 0.0
        self.answer(300)

    def run(self, program: Program) -> Ended:
        with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
            return collect(self.ask(program.request(folder), program.timeout + 60), folder)

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            return self.answer(timeout)
        except BaseException:  # also pytest-timeout's: an answer that nobody waits for must not meet the next question
            close()
            raise

    def answer(self, timeout: float) -> dict[str, Any]:
        """The next line of the warm process.

        Raises:
            RuntimeError: there is none in ``timeout`` seconds.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline() if select.select([self.process.stdout], [], [], timeout)[0] else ""
        if not line:
            raise RuntimeError(f"the warm process did not answer in {timeout} s")
        answer = json.loads(line)
        self.cpu_seconds = answer["cpu"]
        return answer

    def close(self) -> None:
        """End it, and what it runs."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_warm: WarmProcess | None = None


def run_forked(
    program: Path | str,
    *args: object,
    nproc: int | None = None,
    timeout: float = 300,
    directory: Path | None = None,
    **env: str,
) -> Ended:
    """Run ``python program *args`` (or "-m", module, ...) on ``nproc`` ranks; None: alone, and not as a rank.

    Args:
        directory: to run in, in place of this process's.

    Raises:
        ValueError: ``env`` changes what is read at the start of a process.
    """
    wanted = Program(str(program), [str(part) for part in args], nproc, timeout, directory, env)
    return warm_process().run(wanted)


def start_forked(
    program: Path | str,
    *args: object,
    nproc: int | None = None,
    timeout: float = 300,
    directory: Path | None = None,
    **env: str,
) -> Background:
    """As `run_forked`, which returns when the program has ended; this one returns at once."""
    wanted = Program(str(program), [str(part) for part in args], nproc, timeout, directory, env)
    return Background(warm_process(), wanted)


def warm_process() -> WarmProcess:
    """This session's."""
    global _warm
    _warm = _warm or WarmProcess()
    return _warm


def run_ranks(
    program: Path | str,
    nproc: int | None,
    *args: object,
    timeout: float = 300,
    directory: Path | None = None,
    **env: str,
) -> str:
    """As `torchrun.run_torchrun`, in forks: returns what the ranks printed, rank 0's first.

    Raises:
        AssertionError: a rank failed or did not end in ``timeout`` seconds; the message holds the end of its output.
    """
    ended = run_forked(program, *args, nproc=nproc, timeout=timeout, directory=directory, **env)
    assert not ended.late, f"{program} did not end in {timeout} s\n{ended.out[-3000:]}\n{ended.err[-5000:]}"
    assert ended.code == 0, f"{program} failed ({ended.code})\n{ended.out[-3000:]}\n{ended.err[-6000:]}"
    return ended.out


def run_alone(program: Path | str, *args: object, **options: Any) -> str:
    """`run_ranks` for a program of one process that is nobody's rank."""
    return run_ranks(program, None, *args, **options)


def fork_environment() -> dict[str, str]:
    """What ranks of torchrun have, and ``tests/`` on the path, so that programs share modules with tests."""
    environment = rank_environment()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return environment | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def cpu_seconds() -> float:
    """CPU seconds of the warm process and all its forks up to its last answer; 0 when it has ended."""
    return _warm.cpu_seconds if _warm else 0.0


def close() -> None:
    """End the warm process; the next run starts another."""
    global _warm
    ended, _warm = _warm, None
    if ended:
        ended.close()


atexit.register(close)
