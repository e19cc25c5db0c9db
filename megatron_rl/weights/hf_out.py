"""Any layout out to a Hugging Face folder, streamed: each rank fills and writes some of the files.

The files of one wave, one for each rank, are themselves a layout, so filling them is a reshard like any other. A rank
never holds more than its own weights, one file and the staging buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.layouts import hf_layout
from megatron_rl.models.parameters import whole
from megatron_rl.parallel.agreement import Agreement
from megatron_rl.reshard import Layout, Readable, Resharder, Shard, Transport, WireFormat
from megatron_rl.reshard.layout import restricted
from megatron_rl.weights.fill import check_tensors, empty_tensors
from megatron_rl.weights.hf_folder import MAX_SHARD_BYTES, HFDescription, HFFile, HFFolderWriter
from megatron_rl.weights.sync import default_transport

MAX_STAGING_BYTES = 64 << 20


def save_hf(
    layout: Layout,
    tensors: Mapping[str, Readable],
    architecture: Architecture,
    folder: str | Path,
    *,
    rank: int,
    transport: Transport | None = None,
    hf_config: PretrainedConfig | Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation_config: GenerationConfig | None = None,
    dtype: torch.dtype | WireFormat | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    max_staging_bytes: int = MAX_STAGING_BYTES,
    overwrite: bool = False,
    beside: Callable[[Path], object] | None = None,
) -> Path:
    """Write a folder that transformers, SGLang and vLLM load as it is. Collective over all ranks of ``layout``.
    The folder appears complete or not at all; all ranks must see one file system.

    Args:
        layout: where the weights sit, for example `models.megatron_layout`.
        tensors: this rank's, by shard name.
        rank: this rank, as ``layout`` numbers ranks.
        transport: reaches all ranks of ``layout``; None takes the default process group, if there is one.
        hf_config: of the Hugging Face model the weights came from; None makes a fresh one. The first rank's counts,
            and so do its tokenizer and generation settings.
        dtype: of all tensors in the files, or of each; None is that of ``tensors``, and the description's exceptions.
        max_shard_bytes: largest file; a rank needs this much memory, on the device of ``tensors``.
        overwrite: replace an existing folder.
        beside: called on every rank with the unfinished folder, for what else belongs into it.

    Raises:
        ConfigError: the folder exists and may not be replaced, or ``tensors`` do not fit ``layout``.
        PeerError: another rank failed.
    """
    transport = transport or default_transport()
    some = next(iter(tensors.values()))
    description = HFDescription(architecture, hf_config, tokenizer, generation_config)
    dtype = dtype or hf_layout(architecture).dtypes(some.dtype)
    writer = HFFolderWriter(folder, description, dtype, max_shard_bytes, overwrite)
    ranks = tuple(sorted(layout.replica_of))
    together = Agreement(transport.peers(ranks, rank, some.device), "nothing was published")
    with together.attempt():
        check_tensors(layout, rank, tensors)
        check_complete(layout, writer.tensors)
    with writer.writing(together, rank == ranks[0]):
        with together.attempt() as writing:
            for wave in writer.shares(ranks):
                filled = _gather(wave, layout, tensors, rank, transport, writer.dtypes, max_staging_bytes)
                if rank in wave:
                    writing.run(writer.write, wave[rank], filled)
            if beside is not None:
                writing.run(beside, writer.partial)
        with together.attempt():
            if rank == ranks[0]:
                writer.commit()
    return writer.folder


def _gather(
    wave: Mapping[int, HFFile],
    layout: Layout,
    tensors: Mapping[str, Readable],
    rank: int,
    transport: Transport,
    dtypes: WireFormat,
    max_staging_bytes: int,
) -> dict[str, Tensor]:
    """The tensors of this rank's file of the wave, from wherever they sit."""
    target = _wave_layout(wave)
    source = restricted(layout, {name for file in wave.values() for name in file.tensors})
    device = next(iter(tensors.values())).device
    filled = empty_tensors(target, rank, dtypes, device)
    Resharder(source, target, rank, transport, dtypes, max_staging_bytes).run(tensors, filled)
    return filled


def _wave_layout(wave: Mapping[int, HFFile]) -> Layout:
    """Each rank holds the tensors of its file."""

    def emit(replica: Hashable) -> Iterator[Shard]:
        assert isinstance(replica, int)
        return (whole(name, name, shape) for name, shape in wave[replica].tensors.items())

    return Layout("huggingface files", {rank: rank for rank in wave}, emit)


def check_complete(layout: Layout, tensors: Iterable[str]) -> None:
    """Raise ConfigError unless some rank of ``layout`` holds a part of each of ``tensors``."""
    held = {span.tensor for replica in layout.replicas for shard in layout.shards_of(replica) for span in shard.spans}
    missing = [name for name in tensors if name not in held]
    if missing:
        raise ConfigError(
            f"layout {layout.name!r} lacks {len(missing)} tensors that a Hugging Face folder needs, first "
            f"{missing[0]!r}: a value model, without output layer, cannot be saved as a language model"
        )
