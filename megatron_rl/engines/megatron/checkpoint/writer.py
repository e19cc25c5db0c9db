"""`CheckpointWriter`: one save in Megatron-Core's distributed format, with digests; failures are raised on every rank.

In Megatron-Core's own save the other ranks wait forever when rank 0 fails to write the files that only it writes
(``common.pt``, ``.metadata``, ``metadata.json``): here such an error is kept until all ranks agree on the outcome. The
process that writes a tensor file also makes its digest, in the background where it writes there.
"""

from __future__ import annotations

import errno
import gc
import os
import queue
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rl.engines.megatron.checkpoint.common_state import SAVE_OPTIONS, common_written_by
from megatron_rl.engines.megatron.checkpoint.write_results import WriteResults, use_own_results
from megatron_rl.engines.state_storage import WriteError
from megatron_rl.log import leave_out
from megatron_rl.models.checkpoint_digests import digest, write_digests
from megatron_rl.parallel.groups import gather_objects, world_group

TEXT_CHARS = 300  # of an error
BLOCK, PROBE_BLOCKS = 1 << 16, 32  # bytes: less room than that counts as none
BACKEND, VERSION = "torch_dist", 1


class CheckpointWriter:
    """Writes a state into ``folder``, which rank 0 makes.

    `begin` gives a request, to be executed or scheduled; `complete` comes last of what finalises it. All collective
    over the job's ranks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._error: BaseException | None = None  # the first of this rank
        self._digests = WriteResults()  # of this rank's tensor files, by name

    def begin(self, state: dict[str, Any]) -> AsyncRequest:
        """Write everything but tensors, and plan those.

        Raises:
            WriteError: on every rank, what could not be written on one.
        """
        self.on_rank_0(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        self._agree()
        use_own_results()
        leave_out("megatron.core.dist_checkpointing.strategies.filesystem_async", "Local process")
        with common_written_by(self.on_rank_0):
            strategy = _Sharded(self)
            request = dist_checkpointing.save(
                state, str(self.folder), strategy, async_sharded_save=True, **SAVE_OPTIONS
            )
        self._agree()
        assert isinstance(request, AsyncRequest)
        gather, _ = request.finalize_fns  # the second writes metadata.json, as `complete` does: all wait where it fails
        request.finalize_fns[:] = [lambda: self._gather(gather)]
        return request if request.async_fn is None else request._replace(async_fn=self._writing(request.async_fn))

    def complete(
        self, describe: Callable[[Path], object] | None = None, publish: Callable[[], object] | None = None
    ) -> None:
        """Write what makes a checkpoint of the folder. On rank 0 ``describe`` adds to it before the digests are
        written, and ``publish`` comes last.

        Raises:
            WriteError: as `begin`.
        """
        try:
            mine = self._digests.get_nowait()
        except queue.Empty:
            mine = {}  # this rank had nothing to write
        found = gather_objects(mine, world_group())
        self.on_rank_0(lambda: save_config(CheckpointingConfig(BACKEND, VERSION), str(self.folder)))
        if describe is not None:
            self.on_rank_0(lambda: describe(self.folder))
        self.on_rank_0(lambda: write_digests(self.folder, {k: v for part in found for k, v in part.items()}))
        if publish is not None:
            self.on_rank_0(publish)
        self._agree()

    def on_rank_0(self, action: Callable[[], object]) -> None:
        """Run ``action`` on rank 0 unless something failed before; a disk error is kept until `_agree` raises it."""
        if dist.get_rank() == 0 and self._error is None:
            try:
                action()
            except (OSError, RuntimeError) as error:  # torch's writer words a full disk as a RuntimeError
                self._error = error

    def _gather(self, gather: Callable[[], object]) -> None:
        """Collect what the ranks' writers say, and write ``.metadata``."""
        try:
            gather()
        except CheckpointException as error:  # on every rank; why, only on the first
            self._error = next((failure for failure, _ in error.failures.values()), None)
        self._agree()

    def _agree(self) -> None:
        text = None if self._error is None else _reason(self._error, self.folder)
        if told := [part for part in gather_objects(text, world_group()) if part is not None]:
            raise WriteError(told[0])

    def _writing(self, write: Callable[..., None]) -> Callable[..., None]:
        """Megatron-Core's ``async_fn``, which runs in a fork of this process or here, followed by the digests."""

        def write_and_digest(rank: int, buckets: list[tuple[str, str, Any]], results: Any) -> None:
            collects = gc.isenabled()
            gc.disable()  # as Megatron-Core does there: a fork must not free its parent's tensors on the device
            try:
                write(rank, buckets, results)
                self._digests.put(_digests(buckets))
            finally:
                if collects:
                    gc.enable()

        return write_and_digest


def _reason(error: BaseException, folder: Path) -> str:
    """One line. torch's writers hide the errno ("unexpected pos 64 vs 0"), so a small write is tried to get it."""
    known = (os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))
    text = " ".join(str(error).split())
    return next((reason for reason in known if reason in text), "") or _try_to_write(folder) or text[:TEXT_CHARS]


def _try_to_write(folder: Path) -> str:
    """Why writing into ``folder`` fails; empty where it works."""
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for _ in range(PROBE_BLOCKS):
                file.write(bytes(BLOCK))
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _digests(buckets: list[tuple[str, str, Any]]) -> Mapping[str, str]:
    try:
        return {name: digest(Path(path)) for path, name, _ in buckets}
    except OSError:
        return {}  # the file was not written: its writer has told why


class _Sharded(TorchDistSaveShardedStrategy):
    """Megatron-Core's, with the errors of its metadata file kept."""

    def __init__(self, writer: CheckpointWriter) -> None:
        super().__init__(BACKEND, VERSION)
        self._writer = writer

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, *more: Any) -> AsyncRequest:
        finish = writer.finish
        writer.finish = lambda *arguments: self._writer.on_rank_0(lambda: finish(*arguments))
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret, *more)
