"""A process of its own that starts one server and outlives neither its owner nor the server; run by path, stdlib only.

    python guard.py LOG COMMAND...     with a pipe as standard input, whose other end the owner holds

When the pipe ends (the owner closed it, or died in whatever way) or SIGTERM comes, the server's whole process group is
asked to end, then killed. The guard leaves with the server's own exit code when that ends first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with_guard() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end_group(server: subprocess.Popen[bytes]) -> None:
    """End every process of the server's group, the server's own children included."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and group_lives(server):
            time.sleep(POLL_SECONDS)


def group_lives(server: subprocess.Popen[bytes]) -> bool:
    server.poll()  # reaps the leader, whose corpse would count
    try:
        os.killpg(server.pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(log: str, command: list[str]) -> int:
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ending.set())
    with open(log, "ab") as output:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_guard,
        )

    def watch_owner() -> None:
        while os.read(0, 1):
            pass
        ending.set()

    threading.Thread(target=watch_owner, daemon=True).start()
    while server.poll() is None and not ending.wait(POLL_SECONDS):
        pass
    code = server.poll()
    end_group(server)
    return 0 if code is None else code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
