"""A converted model as a Megatron checkpoint that fits any layout: a run's folder as Megatron-LM's ``--load`` takes it.

It is written straight from the source, some rows at a time: no model is built, and no process holds one. What it is
made of is what Megatron-Core saves of such a model (`models/stored_tensors.py`), cut as the ranks of the asked-for
layout hold it. The iteration's sub-folder ``hf`` carries the model's config and tokenizer.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rl.engines.megatron.checkpoint.tensor_files import TensorFiles, Written, without_crc32, write_metadata
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.checkpoint_digests import COMMON, write_digests
from megatron_rl.models.checkpoint_reader import LATEST, RELEASE, point_to
from megatron_rl.models.components.mla import LATENT_EPS
from megatron_rl.models.job_arguments import architecture_from_arguments, arguments_from_architecture
from megatron_rl.models.pipeline import padded_vocab
from megatron_rl.models.stored_tensors import HeldPart, StoredPart, held_parts, stored_parts
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.reshard import Shard, WireFormat
from megatron_rl.reshard.layout import Span
from megatron_rl.reshard.rectangle import Rectangle
from megatron_rl.weights.file_copies import in_threads, num_threads, row_blocks
from megatron_rl.weights.hf_folder import HFFolderWriter
from megatron_rl.weights.megatron_checkpoint import differences
from megatron_rl.weights.opened_weights import OpenedWeights
from megatron_rl.weights.source import TensorSource
from megatron_rl.weights.value_head_file import SHARED_VALUE_HEAD

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64 << 20  # of a tensor that are stored as one part
# What `megatron.core.dist_checkpointing` writes as metadata.json (core.CheckpointingConfig).
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_converted(
    opened: OpenedWeights,
    writer: HFFolderWriter,
    context: ParallelContext,
    sizes: ParallelSizes,
    refuse_damage: Callable[[], None],
) -> None:
    """Write the Megatron checkpoint; each rank of ``context`` writes files of its own. Collective.

    Args:
        sizes: the layout whose ranks the files are for.
        refuse_damage: called on every rank before the checkpoint is published.

    Raises:
        ConfigError: the sizes do not fit the model.
    """
    a, together = opened.description.architecture, context.agreement
    vocab = padded_vocab(a.vocab, sizes.tp)
    parts, held = list(stored_parts(a, vocab)), held_parts(a, sizes, vocab)
    kinds = _kinds(parts, writer.dtypes)
    head = opened.value_head
    if head is not None:
        kinds[SHARED_VALUE_HEAD] = (tuple(head.shape), head.dtype)
    # A target named like an iteration is one iteration of a run; any other is a run that holds only a release.
    alone = re.fullmatch(rf"iter_\d{{7}}|{RELEASE}", writer.folder.name) is not None
    folder = writer.partial if alone else writer.partial / RELEASE
    with writer.writing(together, context.rank == 0):
        with together.attempt():
            folder.mkdir(exist_ok=True)
            threads = num_threads(sizes.smallest_world, context.world_size)

            def write(number: int, stop: threading.Event) -> Written:
                files = TensorFiles(folder)
                first, step = number * context.world_size + context.rank, threads * context.world_size
                with without_crc32():
                    for part in parts:
                        owned = [one for one in held[part.shard.name] if one.rank % step == first]
                        if not stop.is_set():
                            _write_part(files, part, owned, kinds[part.stored.key][1], opened.tensors)
                    if head is not None and first == 0:
                        files.write(0, SHARED_VALUE_HEAD, (0, 0), tuple(head.shape), head.dtype, (head,))
                return files.close()

            written = in_threads(threads, write)
        gathered = [one for several in context.gather_objects(written) for one in several]
        refuse_damage()
        with together.attempt():
            if context.rank == 0:
                write_metadata(folder, kinds, gathered)
                torch.save(_job_state(a, sizes, vocab, writer.dtypes.dtype, folder.name), folder / COMMON)
                (folder / "metadata.json").write_text(json.dumps(FORMAT))
                write_digests(folder, {name: value for one in gathered for name, value in one.digests.items()})
                opened.description.write_into(folder, writer.dtypes.dtype)
                if not alone:
                    (writer.partial / LATEST).write_text(RELEASE)
                writer.publish()
                if alone:
                    point_to(writer.folder)


def _kinds(parts: Sequence[StoredPart], dtypes: WireFormat) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Key -> shape and dtype of each stored tensor: the widest dtype of all that lies in it."""
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for part in parts:
        given = [dtypes.of(span.tensor) for span in part.shard.spans]
        if part.stored.key in kinds:
            given.append(kinds[part.stored.key][1])
        widest = given[0]
        for dtype in given[1:]:
            widest = torch.promote_types(widest, dtype)
        kinds[part.stored.key] = (part.lead + part.shard.shape, widest)
    return kinds


def _write_part(
    files: TensorFiles, part: StoredPart, held: Sequence[HeldPart], dtype: torch.dtype, source: TensorSource
) -> None:
    """Write what ranks hold of a shard, in chunks, each of them a block of rows at a time."""
    flat = len(part.shard.shape) == 1
    row_bytes = part.shard.matrix_shape[1] * dtype.itemsize

    for rank, rectangle in held:
        _, _, left, right = rectangle
        for low, high in row_blocks(*rectangle[:2], rectangle.num_cols * dtype.itemsize, CHUNK_BYTES):
            offsets = (*part.stored.place, low) if flat else (*part.stored.place, low, left)
            shape = (1,) * len(part.lead) + ((high - low,) if flat else (high - low, right - left))
            blocks = (
                read_rows(part.shard, start, stop, dtype, source)[:, left:right].contiguous()
                for start, stop in row_blocks(low, high, row_bytes)
            )
            files.write(rank, part.stored.key, offsets, shape, dtype, blocks)
        if part.stateful and rectangle.row_start == rectangle.col_start == 0:
            files.write_state(rank, part.state_key)


def read_rows(shard: Shard, start: int, stop: int, dtype: torch.dtype, source: TensorSource) -> Tensor:
    """Rows of a shard, as a matrix, from ``source``; zeros where nothing fills them."""
    wanted = Rectangle(start, stop, 0, shard.matrix_shape[1])
    found = [(span, max(start, span.row), min(stop, span.row + span.num_rows)) for span in shard.spans]
    found = [(span, low, high) for span, low, high in found if low < high]
    if len(found) == 1 and found[0][1:] == (start, stop) and found[0][0].num_cols == wanted.num_cols:
        return source.read(_rows_of(*found[0])).to(dtype).contiguous()
    filled = sum((high - low) * span.num_cols for span, low, high in found)
    block = (torch.empty if filled == wanted.numel else torch.zeros)(stop - start, wanted.num_cols, dtype=dtype)
    for span, low, high in found:
        block[low - start : high - start, span.col : span.col + span.num_cols] = source.read(_rows_of(span, low, high))
    return block


def _rows_of(span: Span, low: int, high: int) -> Span:
    """The part of a span in rows ``[low, high)`` of its shard."""
    first = span.row_start + low - span.row
    return Span(span.tensor, first, first + high - low, span.col_start, span.col_stop, low, span.col)


def _job_state(a: Architecture, sizes: ParallelSizes, vocab: int, dtype: torch.dtype, name: str) -> dict[str, Any]:
    """What Megatron-LM keeps in a checkpoint beside tensors (checkpointing.py generate_state_dict)."""
    arguments = arguments_from_architecture(a, sizes, vocab, dtype)
    if a.mla is not None and a.norm_eps != LATENT_EPS:
        other = [f"rms_norm_eps={a.norm_eps}, but {LATENT_EPS} of latents"]
    else:
        said = architecture_from_arguments(arguments, vocab, in_family=False)
        other = [f"{ours}={x!r}" for (ours, _), x, _ in differences(a, said)]
    if other or a.value_model:
        logger.warning(
            "Megatron-LM has no arguments for this model (%s): its own scripts would compute another one from this "
            "checkpoint; megatron_rl reads it as it is",
            ", ".join(other) or "a value head",
        )
    iteration = int(name.removeprefix("iter_")) if name.startswith("iter_") else 0
    return {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
    }
