"""torchrun whose ranks are forks: its own rendezvous, restarts, signals and reports, but no import for each rank.

Only `subprocess.Popen` is replaced where torchrun starts a rank. One test of restarts and one of launching keep ranks
that are processes of their own: tests/run/test_resume.py, tests/cli/test_convert_command.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy
import warm_process
from forked import Background, Ended, run_forked, start_forked
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler


def run_forked_torchrun(*arguments: object, timeout: float = 300, **env: str) -> Ended:
    """Run ``torchrun *arguments``: options, a program (a file) and what it is given."""
    return run_forked(__file__, *arguments, timeout=timeout, **env)


def start_forked_torchrun(*arguments: object, timeout: float = 300, **env: str) -> Background:
    """As `run_forked_torchrun`, and returns at once."""
    return start_forked(__file__, *arguments, timeout=timeout, **env)


class Fork(subprocess.Popen):
    """A rank. Its end, its exit code and signals to it are as `Popen` has them for any child."""

    def __init__(self, args: Sequence[str], env: dict[str, str], **_: Any) -> None:
        self.program, self.environment = list(args[2:]), env  # after the interpreter and -u
        super().__init__(args)

    def _execute_child(self, *_: Any) -> None:
        # From a thread, which is the main thread of the fork: there is nothing of torchrun's on a rank's stack.
        starter = threading.Thread(target=self.fork)
        starter.start()
        starter.join()
        self._child_created = True

    def fork(self) -> None:
        ready, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ready)
            self.become_a_rank(told)
        os.close(told)
        os.read(ready, 1)  # the rank leads a group, to which torchrun may send signals
        os.close(ready)

    def become_a_rank(self, told: int) -> NoReturn:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(told)
        os.environ.clear()
        os.environ.update(self.environment)
        numpy.random.seed()
        os._exit(warm_process.execute(self.program[0], self.program[1:]))


if __name__ == "__main__":
    subprocess_handler.Popen = Fork
    run.main(sys.argv[1:])
