"""`WriteResults`: through which Megatron-Core's checkpoint writers report to the rank that forked them.

Megatron-Core starts a manager process for it (filesystem_async._get_write_results_queue), by ``spawn``: that process
imports the user's script again, so a script without ``if __name__ == "__main__"`` would train inside it, and one from a
notebook or standard input cannot be imported at all. A file in memory that parent and fork share needs no process.
"""

from __future__ import annotations

import os
import pickle
import queue
import tempfile
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


class WriteResults:
    """A queue for the results of one save: its writer, a fork of this process or itself, puts one result."""

    def __init__(self) -> None:
        # Where there is no memfd, a file without a name.
        memory = getattr(os, "memfd_create", None)
        self._file = os.fdopen(memory("results"), "w+b") if memory else tempfile.TemporaryFile()  # noqa: SIM115

    def put(self, result: Any) -> None:
        """Keep ``result``: what was written, or the error that the writer ended with."""
        pickle.dump(result, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """What was put.

        Raises:
            queue.Empty: nothing; the writer ended without a result.
        """
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None


def use_own_results() -> None:
    """Let the writers of the save that follows report through a `WriteResults`."""
    filesystem_async._results_queue = WriteResults()
