"""Tensors as SGLang takes them over HTTP: pickled, base64. Servers on this machine get handles of shared memory or of
GPU memory, others the bytes: parsing those takes SGLang a hundred times as long as copying them.

SGLang unpickles data types only (`sglang.srt.utils.common.SafeUnpickler`), which torch tensors are.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, multiprocessing
from torch.multiprocessing import reductions

PROTOCOL = 4
SHARED_MEMORY, MARGIN = "/dev/shm", 64 << 20
ALIGNMENT = 8  # bytes: a tensor can only be seen where its elements would lie anyway
DEVICE_ARGUMENT = 6  # of torch.multiprocessing.reductions.rebuild_cuda_tensor


def named_tensors(tensors: Mapping[str, Tensor], shared: bool = False) -> str:
    """What load_format=None and "direct" take; ``shared``: see `serialize`."""
    return serialize([(name, t.detach() if shared else _alone(t)) for name, t in tensors.items()], shared)


def flattened_bucket(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What load_format="flattened_bucket" takes, once serialized: all bytes in one tensor, and where each one lies."""
    places, parts, start = [], [], 0
    for name, tensor in tensors.items():
        place = {"name": name, "shape": tuple(tensor.shape), "dtype": tensor.dtype, "numel": tensor.nbytes}
        places.append(SimpleNamespace(**place, start_idx=start, end_idx=start + tensor.nbytes))
        padding = tensor.new_zeros(-tensor.nbytes % ALIGNMENT, dtype=torch.uint8)
        parts += [tensor.detach().contiguous().view(-1).view(torch.uint8), padding]
        start += sum(part.numel() for part in parts[-2:])
    return {"flattened_tensor": torch.cat(parts), "metadata": places}


def serialize(content: Any, shared: bool = False) -> str:
    """Base64 text.

    Args:
        shared: one reader on this machine maps the tensors instead of getting their bytes, which are moved to shared
            memory for that and stay there. They must stay alive and unchanged until the server has answered; so must
            tensors on a GPU.
    """
    buffer = io.BytesIO()
    if any(tensor.is_cuda for tensor in _tensors(content)):
        _HandlePickler(buffer, PROTOCOL).dump(content)
    elif shared:
        with _by_name():
            ForkingPickler(buffer, PROTOCOL).dump(content)
    else:
        pickle.Pickler(buffer, PROTOCOL).dump(content)
    return base64.b64encode(buffer.getbuffer()).decode()


@contextlib.contextmanager
def _by_name() -> Iterator[None]:
    """Shared memory has names: the file descriptors of torch's other way may only be fetched by a child process, and a
    server that tries dies of an AuthenticationError."""
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        multiprocessing.set_sharing_strategy(before)


def shared_buffer(num_bytes: int) -> Tensor:
    """``[num_bytes]`` uint8 in shared memory, as `serialize` would move them there; see `free_shared_memory`."""
    with _by_name():
        storage = torch.UntypedStorage._new_shared(num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


def requests(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in their order, cut where a request would pass ``max_bytes``; a larger tensor goes alone."""
    cut: list[list[str]] = []
    filled = max_bytes
    for name, size in sizes.items():
        if not cut or filled + size > max_bytes:
            cut.append([])
            filled = 0
        cut[-1].append(name)
        filled += size
    return cut


def free_shared_memory() -> int:
    """Bytes that may still be shared: a process that writes beyond what there is would be killed."""
    return max(shutil.disk_usage(SHARED_MEMORY).free - MARGIN, 0) if os.path.isdir(SHARED_MEMORY) else 0


def unshared_bytes(tensors: Iterable[Tensor]) -> int:
    """What would move to shared memory with ``tensors``: all of the memory that they lie in."""
    storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_cuda and not tensor.is_shared()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _HandlePickler(ForkingPickler):
    """CUDA IPC handles that name the device by its UUID, as SGLang's patch of torch's reductions expects: the server
    may count its devices otherwise (sglang.srt.utils.patch_torch)."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_cuda:
            return NotImplemented
        rebuild, arguments = reductions.reduce_tensor(value)
        uuid = str(torch.cuda.get_device_properties(arguments[DEVICE_ARGUMENT]).uuid)
        return rebuild, (*arguments[:DEVICE_ARGUMENT], uuid, *arguments[DEVICE_ARGUMENT + 1 :])


def _tensors(content: Any) -> Iterable[Tensor]:
    if isinstance(content, dict):
        content = list(content.items())
    return [value for _, value in content if isinstance(value, Tensor)]


def _alone(tensor: Tensor) -> Tensor:
    """The tensor without the rest of its storage, all of which would be pickled."""
    tensor = tensor.detach()
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole or tensor.is_cuda else tensor.clone(memory_format=torch.contiguous_format)
