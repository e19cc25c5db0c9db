"""Run in SGLang's own environment: a process that has imported SGLang once, and forks the servers that tests start.

usage: warm_servers.py SOCKET    until standard input ends

A server costs 30 CPU-seconds of imports, ten for each of its three processes; forks have them before they start. What
runs is SGLang's own ``launch_server`` with the command line, environment, folder and output that the one who connects
hands over (`server_stub.py`), in a process group of its own. Its schedulers and its detokenizer are forked as well,
where a server by itself spawns them. The group is killed when the one who connected has gone.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

sys.path.append(str(Path(__file__).resolve().parents[1]))
from program_end import exit_code_of

LIBRARIES = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.layers.sampler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
)
MODULE = "sglang.launch_server"
MAX_REQUEST = 1 << 20
POLL_MILLISECONDS = 50
PR_SET_CHILD_SUBREAPER = 36  # prctl(2): processes whose parent was killed become this one's children


def import_everything() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.modules.pop(MODULE, None)
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError("a library started threads when it was imported: forks would lack them")
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page


@dataclass(frozen=True)
class Server:
    pid: int
    asking: socket.socket  # of the one who waits for its end


def serve(listening: socket.socket) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    servers: dict[int, Server] = {}
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    poll.register(listening, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll(POLL_MILLISECONDS):
            if descriptor == 0:
                for server in servers.values():
                    kill_group(server.pid)
                return
            if descriptor == listening.fileno():
                server = start(listening)
                servers[server.pid] = server
                poll.register(server.asking, select.POLLIN | select.POLLHUP)
            else:  # nothing more is ever sent: it has gone
                gone = next(each for each in servers.values() if each.asking.fileno() == descriptor)
                kill_group(gone.pid)
                poll.unregister(descriptor)
                servers.pop(gone.pid).asking.close()
        while (ended := os.waitpid(-1, os.WNOHANG) if has_children() else (0, 0))[0]:
            if ended[0] in servers:
                server = servers.pop(ended[0])
                kill_group(server.pid)  # what it left behind
                poll.unregister(server.asking)
                with contextlib.suppress(OSError), server.asking as asking:
                    asking.sendall(json.dumps({"code": os.waitstatus_to_exitcode(ended[1])}).encode() + b"\n")


def has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def start(listening: socket.socket) -> Server:
    """Fork the server that is asked for, and tell its process to the one who asks."""
    asking, _ = listening.accept()
    request, descriptors = receive(asking)
    pid = os.fork()
    if pid == 0:
        listening.close()
        asking.close()
        be_the_server(request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    asking.sendall(json.dumps({"pid": pid}).encode() + b"\n")
    return Server(pid, asking)


def receive(asking: socket.socket) -> tuple[dict, list[int]]:
    """{"arguments", "environment", "directory"} as one line, and the descriptors of standard output and error."""
    text, descriptors = b"", array.array("i")
    while not text.endswith(b"\n"):
        part, ancillary, _, _ = asking.recvmsg(MAX_REQUEST, socket.CMSG_SPACE(2 * descriptors.itemsize))
        if not part:
            raise RuntimeError("the one who asked for a server went away before it had said for which")
        text += part
        for _, _, data in ancillary:
            descriptors.frombytes(data)
    return json.loads(text), list(descriptors)


def be_the_server(request: dict, descriptors: list[int]) -> NoReturn:
    """``python -m sglang.launch_server`` up to the exit code."""
    os.setsid()
    for own, given in enumerate([os.open(os.devnull, os.O_RDONLY), *descriptors]):
        os.dup2(given, own)
        os.close(given)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *_arguments, **_options: None  # SGLang asks for "spawn"
    sys.argv = request["arguments"]
    code = exit_code_of(lambda: runpy.run_module(MODULE, run_name="__main__", alter_sys=True))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    import_everything()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen()
        print("ready", flush=True)
        serve(listening)


if __name__ == "__main__":
    main()
