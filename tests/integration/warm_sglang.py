"""One warm SGLang a session: `warm_python` is a Python to start servers with, in seconds instead of half a minute."""

from __future__ import annotations

import atexit
import json
import os
import select
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
START_SECONDS = 300


class WarmSGLang:
    """The process that forks servers, and the script that has one forked; see `warm_servers.py`."""

    def __init__(self, python: str) -> None:
        from megatron_rl.rollout.sglang.server import launch_environment  # most sessions start no server

        self.folder = tempfile.TemporaryDirectory(prefix="warm-sglang-")
        path = Path(self.folder.name, "socket")
        environment = launch_environment(os.environ | {"HF_HUB_OFFLINE": "1"}, "cpu", 1)
        Path(f"{path}.environment").write_text(json.dumps(environment))
        Path(f"{path}.pids").mkdir()
        self.python = Path(self.folder.name, "python")
        stub = [sys.executable, "-S", str(FOLDER / "server_stub.py"), str(path), python]
        self.python.write_text(f'#!/bin/sh\nexec {shlex.join(stub)} "$@"\n')
        self.python.chmod(0o755)
        self.process = subprocess.Popen(
            [python, str(FOLDER / "warm_servers.py"), str(path)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        ready = select.select([self.process.stdout], [], [], START_SECONDS)[0] and self.process.stdout.readline()
        if ready != b"ready\n":
            self.process.kill()
            assert self.process.stderr is not None
            raise RuntimeError(f"no warm SGLang:\n{self.process.stderr.read().decode(errors='replace')[-3000:]}")

    def close(self) -> None:
        """End it, and all its servers."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.folder.cleanup()


_warm: WarmSGLang | None = None


def warm_python(python: str) -> str:
    """What starts servers as ``python`` does, in forks of one process of this session."""
    global _warm
    _warm = _warm or WarmSGLang(python)
    return str(_warm.python)


def cpu_seconds() -> float:
    """Of the warm process and of its servers that have ended; 0 when there is none."""
    if _warm is None:
        return 0.0
    fields = Path(f"/proc/{_warm.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def close() -> None:
    """End the warm process and all servers; the next that is asked for starts another."""
    global _warm
    ended, _warm = _warm, None
    if ended:
        ended.close()


atexit.register(close)
