"""Runs examples one after another in forks of one process that has imported everything; see `test_small_runs.py`.

Argument: JSON, a list of [name, argv], where argv begins with "megatron-rl" or with a script. One JSON line for each
on standard output: {"name": ..., "code": ..., "output": its last lines}.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import tempfile
import traceback

import datasets  # noqa: F401  what examples import, once
import transformers  # noqa: F401

import megatron_rl.run.build
import megatron_rl.run.trainers  # noqa: F401
from megatron_rl.cli import main

SECONDS = 150


def run(argv: list[str]) -> tuple[int, str]:
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
            os._exit(be(argv))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        log.seek(0)
        return code, log.read().decode(errors="replace")[-4000:]


def be(argv: list[str]) -> int:
    sys.argv = argv
    code = 0
    try:
        if argv[0] == "megatron-rl":
            main()
        else:
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    return code


if __name__ == "__main__":
    for name, argv in json.loads(sys.argv[1]):
        code, output = run(argv)
        print(json.dumps({"name": name, "code": code, "output": output}), flush=True)
