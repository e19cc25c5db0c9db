"""`Mailbox`: how buckets reach a rank of a server within one request; see `server_modules/megatron_rl_receiver.py`."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time

from megatron_rl.rollout.sglang.server_modules import megatron_rl_receiver as receiver
from megatron_rl.rollout.sglang.weight_transfer.wire import SHARED_MEMORY

RECEIVER = f"{receiver.__name__.rpartition('.')[2]}.{receiver.receive.__name__}"  # as servers name it


class Mailbox:
    """The sender's end. The reader takes the file's name away when it has opened it.

    Args:
        max_bytes: of one mail.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        descriptor, self.path = tempfile.mkstemp(prefix="megatron_rl_", dir=SHARED_MEMORY)
        try:
            os.posix_fallocate(descriptor, 0, receiver.MAIL + max_bytes)  # not a SIGBUS later, where memory is full
            self._memory = mmap.mmap(descriptor, 0)
        except BaseException:
            os.unlink(self.path)
            raise
        finally:
            os.close(descriptor)
        self._words = memoryview(self._memory)[: 8 * receiver.WORDS].cast("q")
        self._words[receiver.SENDER] = os.getpid()
        self._words[receiver.NAMESPACE] = receiver.namespace()

    @property
    def is_read(self) -> bool:
        """Whether the reader has written the last bucket into its parameters."""
        return self._words[receiver.READ] == self._words[receiver.POSTED]

    @property
    def error(self) -> str:
        """Why the reader could not; "" = it could, so far."""
        length = self._words[receiver.ERROR]
        return self._memory[8 * receiver.WORDS : 8 * receiver.WORDS + length].decode(errors="replace")

    def post(self, mail: bytes) -> None:
        """Pass the next bucket on; the last one `is_read`."""
        assert self.is_read
        assert len(mail) <= self.max_bytes
        self._memory[receiver.MAIL : receiver.MAIL + len(mail)] = mail
        self._words[receiver.LENGTH] = len(mail)
        time.sleep(0)  # as in the reader
        self._words[receiver.POSTED] += 1

    def end(self) -> None:
        """No more buckets: the reader returns once it has read the last one, at once where it waits."""
        self._words[receiver.POSTED] = receiver.ENDED

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._words.release()
        self._memory.close()
