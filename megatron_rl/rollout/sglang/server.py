"""`SGLangServer`: one server process that belongs to this one: started, watched, restarted, and ended with it.

The command and the environment are plain functions of the config, so that what will run can be read and tested. A
small guard process (`guard`) holds the server and ends it when the owner closes it, fails or is killed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import httpx
from pydantic import Field

from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.devices.cores import usable_cores
from megatron_rl.rollout.sglang import guard
from megatron_rl.rollout.sglang.weight_transfer.bucket_mailbox import RECEIVER

logger = logging.getLogger(__name__)

CPU_SHIM = Path(__file__).parent / "cpu_shim"
SERVER_MODULES = Path(__file__).parent / "server_modules"  # what servers import of ours
LOG_TAIL_LINES = 30
ERROR, ERROR_LENGTH = re.compile(r"[\w.]*(Error|Exception): "), 200  # the last line of a traceback
PORT_ATTEMPTS = 3
PORTS = (20000, 32000)
PORT_DRAWS = 100


class ServerConfig(ConfigRecord):
    """A server that the engine starts."""

    python: str | None = None
    """Python of the environment that SGLang is installed in; None = the one that runs this."""
    host: str = "127.0.0.1"
    """Address that the server listens on; it must be reachable from this process and is best kept private."""
    start_timeout: float = Field(default=900.0, gt=0)
    """Seconds in which a server must be ready; large models take minutes to load."""
    log_dir: str | None = None
    """Where server logs go; None = a folder of this run among the temporary files."""
    context_length: int | None = Field(default=None, gt=0)
    """Most tokens of prompt and completion together; None = the model's own limit."""
    max_total_tokens: int | None = Field(default=None, gt=0)
    """Tokens that the server's KV cache holds; None = the server decides, on a CPU 65536."""
    args: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Further options of sglang.launch_server without their dashes, e.g. mem-fraction-static: 0.7; true = a flag."""


def launch_command(
    config: ServerConfig,
    *,
    python: str,
    model_path: Path,
    port: int,
    tp: int,
    dtype: str,
    max_running: int,
    device: Literal["cpu", "cuda"],
    with_tokenizer: bool = True,
    load_weights: bool = False,
) -> list[str]:
    """The server's command line. Without ``load_weights`` it starts with dummy weights and waits for a push."""
    options: dict[str, str | int | float | bool] = {
        "model-path": str(model_path),
        "host": config.host,
        "port": port,
        "tp": tp,
        "dtype": dtype,
        "max-running-requests": max_running,
        "device": device,
        "skip-server-warmup": True,
        "custom-weight-loader": RECEIVER,
    }
    if not load_weights:
        options["load-format"] = "dummy"
    if not with_tokenizer:
        options["skip-tokenizer-init"] = True
    if config.context_length is not None:
        options["context-length"] = config.context_length
    if config.max_total_tokens is not None or device == "cpu":
        options["max-total-tokens"] = config.max_total_tokens or 65536
    if device == "cpu":
        options |= {"attention-backend": "torch_native", "sleep-on-idle": True}
    options |= {name.replace("_", "-"): value for name, value in config.args.items()}
    command = [python, "-m", "sglang.launch_server"]
    for name, value in options.items():
        if value is not False:
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return command


def launch_environment(
    own: Mapping[str, str], device: Literal["cpu", "cuda"], tp: int, devices: str | None = None
) -> dict[str, str]:
    """The server's environment: ours without what makes a process a rank of this job.

    Args:
        devices: CUDA_VISIBLE_DEVICES of the server; None leaves ours.
    """
    of_ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"}
    of_ranks |= {"MASTER_ADDR", "MASTER_PORT", "GROUP_WORLD_SIZE", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH"}
    # A busy server notices late that a request has come: 60 seconds, where SGLang's own 5 would close the connection.
    environment = {"PYTHONPATH": str(SERVER_MODULES), "SGLANG_TIMEOUT_KEEP_ALIVE": "60"} | {
        name: value for name, value in own.items() if name not in of_ranks and not name.startswith("TORCHELASTIC_")
    }
    if device == "cpu":
        cores = usable_cores()
        bound = "|".join(str(cores[rank % len(cores)]) for rank in range(tp))
        environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(CPU_SHIM), str(SERVER_MODULES)])
        environment |= {"SGLANG_CPU_OMP_THREADS_BIND": bound} if tp > 1 else {}
    elif devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    return environment


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at this moment. It lies below those that systems give out by themselves, because
    minutes pass until the server listens.

    Raises:
        OSError: there is none.
    """
    draw = random.SystemRandom()  # all ranks seed the common generator alike, and would all take the same port
    for _ in range(PORT_DRAWS):
        port = draw.randrange(*PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind((host, port))
            return port
    raise OSError(f"no free port found on {host} in {PORTS[0]}-{PORTS[1]}")


class ServerStartError(RuntimeError):
    """A server ended by itself."""

    def __init__(self, server: SGLangServer, what: str) -> None:
        super().__init__(f"{what}; {server.last_lines()}")
        self.cause, self.log = server.last_error(), server.log


class SGLangServer:
    """One server, from `start` to `close`; a context manager.

    Args:
        model_path: a Hugging Face folder; only its config and tokenizer count unless ``load_weights``.
        name: of the log file.

    Raises:
        ConfigError: the server's Python does not exist.
    """

    def __init__(
        self,
        model_path: str | Path,
        config: ServerConfig | None = None,
        *,
        tp: int = 1,
        dtype: str = "bfloat16",
        max_running: int = 256,
        device: Literal["cpu", "cuda"] = "cpu",
        devices: str | None = None,
        with_tokenizer: bool = True,
        load_weights: bool = False,
        name: str = "sglang",
    ) -> None:
        self.config = config or ServerConfig()
        self.python = server_python(self.config)
        self.model_path, self.tp, self.dtype, self.max_running = Path(model_path), tp, dtype, max_running
        self.device, self.devices = device, devices
        self.with_tokenizer, self.load_weights = with_tokenizer, load_weights
        folder = Path(self.config.log_dir) if self.config.log_dir else Path(tempfile.gettempdir()) / "megatron_rl"
        self.log = folder / f"{name}-{os.getpid()}.log"
        self.port = self._log_start = 0
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{self.config.host}:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether the process lives; it may not be ready yet."""
        return self._guard is not None and self._guard.poll() is None

    def launch(self) -> None:
        """Start the process on a free port and return at once; anything that ran before is ended."""
        self.close()
        self.port = free_port(self.config.host)
        command = launch_command(
            self.config,
            python=self.python,
            model_path=self.model_path,
            port=self.port,
            tp=self.tp,
            dtype=self.dtype,
            max_running=self.max_running,
            device=self.device,
            with_tokenizer=self.with_tokenizer,
            load_weights=self.load_weights,
        )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        logger.info("starting SGLang at %s, log in %s: %s", self.url, self.log, " ".join(command))
        # A session of its own: what kills this job's process group must not kill the guard before its work is done.
        self._guard = subprocess.Popen(
            [sys.executable, "-S", guard.__file__, str(self.log), *command],
            stdin=subprocess.PIPE,
            env=launch_environment(os.environ, self.device, self.tp, self.devices),
            start_new_session=True,
        )

    def wait_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            RuntimeError: it ended, or ``start_timeout`` passed (it is then closed); the message holds its last lines.
        """
        deadline = time.monotonic() + self.config.start_timeout
        while time.monotonic() < deadline:
            if not self.is_running:
                raise ServerStartError(self, "SGLang ended while it started")
            if self.is_ready():
                return
            time.sleep(0.5)
        self.close()
        raise RuntimeError(f"SGLang was not ready in {self.config.start_timeout:.0f} s; {self.last_lines()}")

    def is_ready(self) -> bool:
        """Whether the server answers requests now."""
        try:
            with httpx.stream("GET", f"{self.url}/model_info", timeout=5.0, trust_env=False) as answer:
                return answer.status_code == httpx.codes.OK  # the body is not read: it might never end
        except httpx.HTTPError:
            return False

    def start(self) -> Self:
        """`launch` and `wait_ready`; another port is tried where somebody took ours in between."""
        for attempt in range(PORT_ATTEMPTS):
            self.launch()
            try:
                self.wait_ready()
                break
            except RuntimeError:
                if not self.lost_its_port or attempt == PORT_ATTEMPTS - 1:
                    raise
        return self

    @property
    def lost_its_port(self) -> bool:
        """Whether it ended because somebody else took its port in between."""
        return "address already in use" in "".join(self._lines()).lower()

    def close(self) -> None:
        """End the server and every process it started; may be called twice."""
        held, self._guard = self._guard, None
        if held is None:
            return
        assert held.stdin is not None
        held.stdin.close()
        try:
            held.wait(timeout=4 * guard.GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            held.kill()
            held.wait()

    def __enter__(self) -> Self:
        return self.start() if not self.is_running else self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def last_lines(self) -> str:
        """The end of the log, for error messages."""
        return "\n".join([f"its log {self.log} ends with:", *self._lines()[-LOG_TAIL_LINES:]])

    def last_error(self) -> str:
        """What ended it, in one line; behind that, its processes complain that they lost one another."""
        found = [line for line in self._lines() if ERROR.match(line) and "connection" not in line.lower()]
        return found[0][:ERROR_LENGTH] if found else "it names no error"

    def _lines(self) -> list[str]:
        """The log since the last launch."""
        if not self.log.exists():
            return []
        return self.log.read_bytes()[self._log_start :].decode(errors="replace").splitlines()


def server_python(config: ServerConfig) -> str:
    """The Python that runs servers.

    Raises:
        ConfigError: there is no such file, or this Python, where none is named, has no SGLang.
    """
    found = config.python or sys.executable
    lacks = config.python is None and importlib.util.find_spec("sglang") is None
    if lacks or not Path(found).is_file():
        problem = f"the Python of this run ({found}) has no SGLang" if lacks else f"no Python at {found}"
        raise ConfigError(
            f"{problem} to start servers with: set actor.rollout.options.server.python to that of the "
            f"environment SGLang is installed in (`make setup-sglang` makes .venv-sglang/bin/python), or attach to "
            f"running servers with actor.rollout.options.urls"
        )
    return found
