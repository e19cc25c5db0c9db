"""Start a test program under the real torchrun, bounded in time, and show its output when it fails.

Programs start a hundred times faster by `forked.run_ranks`, and torchrun's restarts by `forked_torchrun`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def rank_environment() -> dict[str, str]:
    """This process's environment, for ranks: the project on the path, one thread each."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PYTHONWARNINGS": "ignore",
    }


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_torchrun(program: Path | str, nproc: int, *args: str, timeout: float = 300, **env: str) -> str:
    """Run ``program`` on ``nproc`` local ranks and return its standard output.

    Raises:
        AssertionError: it failed or did not end in ``timeout`` seconds; the message holds the end of its output.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    command += [str(program), *args]
    with subprocess.Popen(
        command,
        env=rank_environment() | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            out, err = process.communicate()
            raise AssertionError(f"{program} did not end in {timeout} s\n{out[-3000:]}\n{err[-5000:]}") from None
    assert process.returncode == 0, f"{program} failed ({process.returncode})\n{out[-3000:]}\n{err[-6000:]}"
    return out
