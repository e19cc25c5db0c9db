"""Transfer "disk": safetensors in a folder that trainer and servers see. It alone runs all of SGLang's own loading."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rl.models.safetensors_files import shared_temporary_folder, write_parts
from megatron_rl.rollout.sglang.sglang_client import SGLangClient
from megatron_rl.rollout.sglang.weight_transfer.base import TRANSFERS
from megatron_rl.rollout.sglang.weight_transfer.full import FullTransfer


@TRANSFERS.register("disk")
class DiskTransfer(FullTransfer):
    """See the module.

    Args:
        folder: where to write, seen alike by the servers; None = the temporary files of this machine.
    """

    needs_session = False

    def __init__(self, folder: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._parent, self._num_files = folder, 0
        self._folders = contextlib.ExitStack()  # holds the folder of the update under way
        self._folder: Path | None = None

    def send_whole(self, tensors: Mapping[str, Tensor]) -> None:
        if self._folder is None:
            self._folder = self._folders.enter_context(shared_temporary_folder("weights-", self._parent))
        write_parts(self._folder, tensors, self._num_files)
        self._num_files += 1

    async def complete(self, client: SGLangClient) -> None:
        await client.update_weights_from_disk(str(self._folder), flush_cache=False)

    def drop(self) -> None:
        super().drop()
        self._folders.close()
        self._folder, self._num_files = None, 0
