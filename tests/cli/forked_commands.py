"""Runs commands of the command line in forks of one process that has imported everything, and reports how they ended.

Importing torch and megatron.core costs many seconds; this way a test pays for it once. Requests and answers are JSON
lines on standard input and output: {"arguments": [...]} -> {"code": 2, "out": "...", "err": "..."}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from typing import BinaryIO

from megatron_rl.cli import main
from megatron_rl.cli.errors import mistakes

SECONDS = 120.0  # that one command may take


def run(arguments: list[str]) -> dict[str, object]:
    """Run ``megatron-rl *arguments`` in a child."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            be_the_command(arguments, out, err)
        code = wait(child)
        out.seek(0), err.seek(0)
        return {"code": code, "out": out.read().decode(), "err": err.read().decode()}


def be_the_command(arguments: list[str], out: BinaryIO, err: BinaryIO) -> None:
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.argv = ["megatron-rl", *arguments]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """The child's exit code; -9 when it took too long and was killed."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    mistakes()  # imports what it names
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line)["arguments"])), flush=True)
