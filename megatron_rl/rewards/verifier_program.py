"""The program of `Verifier`'s child process: one JSON request a line on stdin, one JSON answer a line on stdout.

It imports nothing of megatron_rl, so that it starts in the time of importing sympy. Its limits count its own CPU time:
the verdict on an answer does not depend on how busy the machine is, and an orphan ends by itself.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from types import FrameType

MEMORY_BYTES = 4 << 30


class OutOfTimeError(BaseException):
    """Not an Exception, so that math-verify's own handlers let it pass."""


def main() -> None:
    seconds = float(sys.argv[1])
    try:
        import math_verify
    except ImportError as error:
        answer({"error": str(error)})
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    signal.signal(signal.SIGVTALRM, out_of_time)
    answer({"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        # SIGPROF keeps its default action, the end of the process: no handler runs inside one long integer operation.
        signal.setitimer(signal.ITIMER_PROF, seconds + 1)
        verdict = equal(math_verify, request["truth"], request["response"], seconds)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answer({"equal": verdict})


def equal(math_verify, truth: str, response: str, seconds: float) -> bool | None:  # type: ignore[no-untyped-def]  # a module
    """math-verify's verdict; None when it ran out of time."""
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        expected = math_verify.parse(truth, parsing_timeout=None)
        given = math_verify.parse(response, parsing_timeout=None)
        verdict = bool(math_verify.verify(expected, given, timeout_seconds=None))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        return verdict
    except OutOfTimeError:
        return None


def out_of_time(_signum: int, _frame: FrameType | None) -> None:
    raise OutOfTimeError


def answer(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
