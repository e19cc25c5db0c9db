"""A process that has imported everything once and forks the programs of tests, alone or as ranks (see `forked.py`).

Importing torch and megatron.core costs five CPU-seconds a process, and torchrun itself imports torch. Requests and
answers are JSON lines on standard input and output. For each request an agent is forked: leader of a process group of
its own, host of the ranks' store, and like torchrun it ends all ranks when one fails.

What a fork cannot carry over is not there before it: no threads (checked), no process group, no autograd engine. What
forks share and real processes do not: the seed of `hash`, so that sets of strings have one order on all ranks. Tests in
which this could hide a mistake, and those of launching, keep the real torchrun; see also `forked_torchrun.py`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import struct
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from program_end import exit_code_of

PORT = struct.Struct("i")
SAME_ERROR_SECONDS = 0.2  # from the first rank that fails to SIGTERM for the others, which may be saying the same
GRACE_SECONDS = 5.0  # from the first rank that fails to SIGKILL for the others
POLL_SECONDS = 0.005
PR_SET_CHILD_SUBREAPER = 36  # prctl(2): processes whose parent has ended become this one's children
LIBRARIES = (
    "megatron_rl",  # first: it gives megatron.core its CPU face
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "numpy",
    "pytest",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
)


def import_everything() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    import megatron_rl

    for module in pkgutil.walk_packages(megatron_rl.__path__, "megatron_rl."):
        if not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ImportError:  # of an optional package: the program that needs it says so itself
                continue
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # every load of a model makes it, in a CPU-second
    tasks = Path("/proc/self/task")
    if tasks.exists() and len(list(tasks.iterdir())) > 1:
        raise RuntimeError("a library started threads when it was imported: forks would lack them")
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page


@dataclass
class Running:
    """A program on its way."""

    agent: int  # its process
    answer: int  # where it tells how the program ended
    deadline: float


def serve(requests: int) -> None:
    """Answer each request with {"code": of the first rank that failed or 0, "failed": its rank, "late", "cpu"}.

    One that is to run in the background is answered by its number at once, and {"wait_for": number} with its end;
    {"end": number} ends it.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    background: dict[int, Running] = {}
    with os.fdopen(requests) as lines:
        while line := lines.readline():
            request = json.loads(line)
            if "wait_for" in request:
                answer = finish(background.pop(request["wait_for"]), requests)
            elif "end" in request:
                kill_group(background.pop(request["end"]).agent)
                answer = {}
            elif request["background"]:
                running = start(request)
                background[running.agent] = running
                answer = {"number": running.agent}
            else:
                answer = finish(start(request), requests)
            print(json.dumps(answer | {"cpu": sum(os.times()[:4])}), flush=True)
    for running in background.values():
        kill_group(running.agent)


def start(request: dict[str, Any]) -> Running:
    answer, told = os.pipe()
    agent = os.fork()
    if agent == 0:
        os.setsid()
        os.close(answer)
        be_the_agent(request, told)
    os.close(told)
    return Running(agent, answer, time.monotonic() + request["timeout"])


def finish(running: Running, requests: int) -> dict[str, Any]:
    late = False
    while not os.waitpid(running.agent, os.WNOHANG)[0]:
        late = time.monotonic() > running.deadline
        asked_to_end = bool(select.select([requests], [], [], POLL_SECONDS)[0])  # the one who waits for this has gone
        if late or asked_to_end:
            break
    kill_group(running.agent)  # also what a rank left behind
    with os.fdopen(running.answer) as pipe:
        said = pipe.read()
    return {"code": -signal.SIGKILL, "failed": 0, "late": late} | (json.loads(said) if said and not late else {})


def kill_group(leader: int) -> None:
    """End all of the group's processes, and return when they have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-leader, 0)


def be_the_agent(request: dict[str, Any], told: int) -> NoReturn:
    """Fork the ranks, lend them a store, wait for them, tell how they ended."""
    given, port = os.pipe()
    num_ranks = request["nproc"] or 1
    ranks = {}
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            os.close(told)
            be_the_program(request, rank, given)
        ranks[child] = rank
    store = None
    if request["nproc"]:  # after the forks, since it is a thread
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    os.write(port, PORT.pack(store.port if store else 0) * num_ranks)
    ended = wait_for_all(ranks)
    os.write(told, json.dumps(ended).encode())
    os._exit(0)


def wait_for_all(ranks: dict[int, int]) -> dict[str, int]:
    first = {"code": 0, "failed": 0}
    to_send: list[tuple[float, signal.Signals]] = []
    while ranks:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child not in ranks:
            time.sleep(POLL_SECONDS)
            if to_send and time.monotonic() > to_send[0][0]:
                end(ranks, to_send.pop(0)[1])
            continue
        rank, code = ranks.pop(child), os.waitstatus_to_exitcode(status)
        if code and not first["code"]:
            first, now = {"code": code, "failed": rank}, time.monotonic()
            to_send = [(now + SAME_ERROR_SECONDS, signal.SIGTERM), (now + GRACE_SECONDS, signal.SIGKILL)]
    return first


def end(ranks: dict[int, int], how: signal.Signals) -> None:
    for child in ranks:
        os.kill(child, how)


def be_the_program(request: dict[str, Any], rank: int, given: int) -> NoReturn:
    """Become ``python program *args`` (or ``-m module``) as rank ``rank``, up to the exit code."""
    (port,) = PORT.unpack(os.read(given, PORT.size))
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["nproc"]:
        os.environ.update(variables(rank, request["nproc"], port))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name, descriptor in (("out", 1), ("err", 2)):
        file = Path(request["folder"], f"{rank}.{name}")
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(request["directory"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    import numpy

    numpy.random.seed()  # as Python's own generator is by fork
    os._exit(execute(request["program"], request["arguments"]))


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    ranks = {f"{prefix}RANK": str(rank) for prefix in ("", "LOCAL_", "ROLE_")}
    sizes = {f"{prefix}WORLD_SIZE": str(size) for prefix in ("", "LOCAL_", "ROLE_")}
    elastic = {"RESTART_COUNT": "0", "MAX_RESTARTS": "0", "RUN_ID": "forked", "USE_AGENT_STORE": "True"}
    return {
        **ranks,
        **sizes,
        **{f"TORCHELASTIC_{name}": value for name, value in elastic.items()},
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def execute(program: str, arguments: list[str]) -> int:
    """Run it as ``__main__``, then what Python does at the end of a process; returns the exit code."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*paths, *BASE_PATH]
    importlib.invalidate_caches()

    def run() -> None:
        if program == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = arguments.copy()
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(program).resolve().parent))
            sys.argv = [program, *arguments]
            runpy.run_path(program, run_name="__main__")

    code = exit_code_of(run)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


OWN = {str(Path(__file__).resolve().parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
BASE_PATH = [path for path in sys.path if path not in OWN]  # what every program has

if __name__ == "__main__":
    import_everything()
    print(json.dumps({"cpu": sum(os.times()[:4])}), flush=True)
    serve(os.dup(0))
