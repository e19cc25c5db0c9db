"""`OutputLock`: one run at a time in an output folder.

The lock is the kernel's, on the file ``.lock`` in the folder: it ends with its process, however that ends.
Over NFS the server keeps it for all nodes; a file system without locks gets a warning instead.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import weakref
from pathlib import Path
from typing import TextIO

from megatron_rl.config import ConfigError
from megatron_rl.parallel import ParallelContext

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


class OutputLock:
    """Creates ``folder`` if it does not exist, and locks it until `release`. Collective; rank 0 holds the lock.

    Raises:
        ConfigError: on every rank: another run holds the folder, or it cannot be written to.
    """

    def __init__(self, folder: Path, context: ParallelContext) -> None:
        self.folder = folder
        self._created: Path | None = None  # the topmost folder that was created
        self._file: TextIO | None = None
        problem = self._take() if context.rank == 0 else ""
        problem = context.gather_objects(problem)[0]
        if problem:
            raise ConfigError(problem)

    def release(self) -> None:
        """Release the lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def discard(self) -> None:
        """Delete the folder if this object created it, and release the lock: the run failed before its first step."""
        if self._created is not None and self._file is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            for folder in self.folder.parents:
                if self._created not in (folder, *folder.parents) or any(folder.iterdir()):
                    break
                folder.rmdir()
        self.release()

    def _take(self) -> str:
        """Take the lock; returns the reason why it cannot be taken, empty when it is held."""
        missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / LOCK_FILE).open("a+")
        except OSError as error:
            return f"trainer.output_dir={self.folder} cannot be written to ({error}): give another folder"
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            return (
                f"trainer.output_dir={self.folder} is in use by another run ({file.read().strip() or 'just started'}): "
                "wait for its end, or give this run another folder"
            )
        except OSError as error:
            logger.warning("%s: no locks here (%s); two runs in one folder would not be noticed", self.folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file, self._created = file, missing[-1] if missing else None
        # A fork (a checkpoint's writer) would hold the lock after this process was killed.
        lock = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _let_go(lock()))
        return ""


def _let_go(lock: OutputLock | None) -> None:
    if lock is not None:
        lock.release()


def check_writable(folder: Path) -> None:
    """Raise ConfigError unless ``folder``, or the nearest folder above it that exists, can be written to."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "is not a folder" if not place.is_dir() else "cannot be written to"
        raise ConfigError(f"output_dir={str(folder)!r}: {place} {what}: choose another")
