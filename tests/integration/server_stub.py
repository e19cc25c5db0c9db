"""Stands in the process tree where a server would: has it forked by `warm_servers.py`, and lives as long as it does.

usage: server_stub.py SOCKET PYTHON -m sglang.launch_server OPTIONS...

Signals to end are passed on to the server's process group; when this process is killed, so is that group. Its own
folder SOCKET.pids/ tells which server it stands for (see `servers.processes_of`). Anything else than a server on a CPU
is run by PYTHON itself.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

# Read when Python and its libraries start, which the warm process has done.
READ_AT_START = ("PYTHONPATH", "PYTHONHASHSEED", "OMP_", "MKL_", "LD_", "MALLOC")


def can_be_forked(arguments: list[str], started_with: dict[str, str]) -> bool:
    def fixed(environment: dict[str, str]) -> dict[str, str]:
        return {name: value for name, value in environment.items() if name.startswith(READ_AT_START)}

    return arguments[:2] == ["-m", "sglang.launch_server"] and fixed(dict(os.environ)) == fixed(started_with)


def ask(path: str, arguments: list[str]) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    request = {"arguments": arguments, "environment": dict(os.environ), "directory": os.getcwd()}
    text, output = json.dumps(request).encode() + b"\n", array.array("i", [1, 2])
    sent = connection.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, output)])
    connection.sendall(text[sent:])
    return connection


def main() -> int:
    path, python, *arguments = sys.argv[1:]
    started_with = json.loads(Path(f"{path}.environment").read_text())
    if not can_be_forked(arguments, started_with):
        os.execv(python, [python, *arguments])
    with ask(path, [arguments[1], *arguments[2:]]) as connection, connection.makefile("r") as answers:
        server = json.loads(answers.readline())["pid"]
        Path(f"{path}.pids", str(os.getpid())).write_text(str(server))

        def pass_on(number: int, _: FrameType | None) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server, number)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, pass_on)
        ended = answers.readline()
    code = json.loads(ended)["code"] if ended else -signal.SIGKILL
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
