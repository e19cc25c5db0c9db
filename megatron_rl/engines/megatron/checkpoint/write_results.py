"""`WriteResults`: the queue through which Megatron-Core's checkpoint writers report to the rank that forked them.

Megatron-Core starts a manager process for it (filesystem_async._get_write_results_queue), by ``spawn``: that process
imports the user's script again, so a script without ``if __name__ == "__main__"`` would train inside it, and one from a
notebook or standard input cannot be imported at all. A file in memory that parent and fork share needs no process.
"""

from __future__ import annotations

import io
import os
import pickle
import queue
import tempfile
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


class WriteResults:
    """A queue of the results of saves: each save's writer, a fork of this process or itself, puts one result.

    Megatron-Core keeps the queue for every later save, of the job's own as well: a result is given out once.
    """

    def __init__(self) -> None:
        # Where there is no memfd, a file without a name. Unbuffered: what a fork wrote must not hide behind a buffer.
        memory = getattr(os, "memfd_create", None)
        self._file = os.fdopen(memory("results"), "w+b", 0) if memory else tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._taken = 0  # bytes of the results that were given out

    def put(self, result: Any) -> None:
        """Add ``result``: what was written, or the error that the writer ended with."""
        rest = memoryview(pickle.dumps(result))
        self._file.seek(0, os.SEEK_END)
        while rest:
            rest = rest[self._file.write(rest) :]

    def get_nowait(self) -> Any:
        """The oldest result that was not given out yet.

        Raises:
            queue.Empty: there is none; the writer ended without a result.
        """
        self._file.seek(self._taken)
        data = io.BytesIO(self._file.readall())
        try:
            result = pickle.load(data)
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None
        self._taken += data.tell()
        return result


def use_own_results() -> None:
    """Let the writers of the save that follows report through a `WriteResults`."""
    filesystem_async._results_queue = WriteResults()
