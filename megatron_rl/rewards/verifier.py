"""`Verifier`: math-verify in a child process, killed and replaced when a comparison exceeds its time.

math-verify limits its time with SIGALRM, which works only in a main thread, disarms the alarm of anyone else (pytest,
a trainer's watchdog), and cannot interrupt one long operation on big integers. A child process has none of
these problems: it has its own main thread, and a kill always works. Requests and answers are JSON lines on pipes.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from megatron_rl.rewards.reward import RewardError

PROGRAM = Path(__file__).with_name("verifier_program.py")
START_SECONDS = 120.0  # importing sympy takes about a second, on a busy machine many
WALL_FACTOR = 10  # wall seconds allowed for a second of CPU time, for machines with more processes than cores


class Verifier:
    """Compares answers in a child process that is started on first use. Not for several threads at once.

    Args:
        seconds: CPU time of one comparison.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._received = b""

    def equal(self, truth: str, response: str) -> bool | None:
        """Whether the two are mathematically equal; None when that could not be decided in ``seconds``.

        Raises:
            RewardError: math-verify is not installed, or its process ends twice without an answer.
        """
        for _ in range(2):
            if self._child is not None and self._child.poll() is not None:
                self.close()  # it died while idle, through no fault of this request
            child = self._child or self._start()
            try:
                self._send(child, {"truth": truth, "response": response})
                return self._receive(child, self.seconds * WALL_FACTOR)["equal"]
            except TimeoutError:
                self.close()
                return None
            except (BrokenPipeError, EOFError):
                killed = child.wait(5) < 0
                self.close()
                if killed:  # by its own limit on CPU time or memory: the request was at fault
                    return None
        raise RewardError(
            f"the math-verify process ended twice without an answer, comparing {truth!r} and {response!r}"
        )

    def close(self) -> None:
        if self._child is not None:
            _end(self._child)
        self._child, self._received = None, b""

    def _start(self) -> subprocess.Popen[bytes]:
        # -P keeps this folder out of the child's module path.
        command = [sys.executable, "-P", str(PROGRAM), str(self.seconds)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        weakref.finalize(self, _end, child)
        self._child, self._received = child, b""
        try:
            hello = self._receive(child, START_SECONDS)
        except (EOFError, TimeoutError) as error:
            self.close()
            raise RewardError(f"the math-verify process did not start: {type(error).__name__}") from None
        if "error" in hello:
            self.close()
            raise RewardError(f"reward 'math' needs math-verify: pip install math-verify ({hello['error']})")
        return child

    @staticmethod
    def _send(child: subprocess.Popen[bytes], message: dict[str, str]) -> None:
        assert child.stdin is not None  # piped in _start
        child.stdin.write(json.dumps(message).encode() + b"\n")
        child.stdin.flush()

    def _receive(self, child: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        assert child.stdout is not None  # piped in _start
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._received:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                chunk = os.read(child.stdout.fileno(), 65536)
                if not chunk:
                    raise EOFError
                self._received += chunk
        line, self._received = self._received.split(b"\n", 1)
        return json.loads(line)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
