"""Memory shared between processes on one device: a trainer writes straight into the tensors of a colocated engine.

The engine's process calls `export_tensors`, the trainer's `import_tensors` and passes the result to `Resharder.run` as
its target tensors: what arrives is unpacked, or received in place, in the engine's own storage. CUDA tensors go as IPC
handles, CPU tensors as named shared memory, so that the same path runs without a GPU.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing import reductions


class _CpuHandle(NamedTuple):
    """Where a CPU tensor lies in named shared memory."""

    manager: bytes
    file: bytes
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def export_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Handles of ``tensors``, for a process on the same machine (and, on CUDA, the same device).

    The tensors must stay alive as long as another process uses them. A CPU storage moves to shared memory once; the
    tensor object stays valid.
    """
    return pickle.dumps({name: _handle(tensor.detach()) for name, tensor in tensors.items()})


def import_tensors(handles: bytes) -> dict[str, Tensor]:
    """The tensors behind ``handles`` from `export_tensors` in another process: the same memory, no copy.

    Drop them before the exporting process ends. Handles are unpickled: take them only from a process you started.
    """
    return {name: _tensor(handle) for name, handle in pickle.loads(handles).items()}


def finish_writes(tensors: Mapping[str, Tensor]) -> None:
    """Return when all work queued on the devices of ``tensors`` is done, so that another process may read them."""
    for device in {tensor.device for tensor in tensors.values()}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _handle(tensor: Tensor) -> object:
    if tensor.device.type != "cpu":
        return reductions.reduce_tensor(tensor)
    # By file name, not by descriptor: a descriptor reaches only processes that share an authentication key.
    manager, file, num_bytes = tensor.untyped_storage()._share_filename_cpu_()
    shape, stride, offset = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())
    return _CpuHandle(manager, file, num_bytes, tensor.dtype, shape, stride, offset)


def _tensor(handle: object) -> Tensor:
    if isinstance(handle, _CpuHandle):
        storage = torch.UntypedStorage._new_shared_filename_cpu(handle.manager, handle.file, handle.num_bytes)
        empty = torch.empty(0, dtype=handle.dtype)
        return empty.set_(storage, handle.offset, handle.shape, handle.stride)  # type: ignore[call-overload]
    assert isinstance(handle, tuple)
    rebuild, arguments = handle
    return rebuild(*arguments)
