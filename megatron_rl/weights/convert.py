"""`convert`: a Hugging Face folder or a Megatron checkpoint into either of the two.

To Hugging Face it streams: one parameter and one output file are in memory at a time, and under torchrun the ranks
share the files. To Megatron each rank holds its part of the model in the asked-for layout, read straight from the
source; the checkpoint itself fits any layout. It is a run's folder as Megatron-LM's ``--load`` takes it, and carries
the model's config and tokenizer in the sub-folder ``hf`` of the iteration.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.builder import build_model, transformer_config
from megatron_rl.models.checkpoint import LATEST, RELEASE, CheckpointReader, point_to, save_checkpoint
from megatron_rl.models.checkpoint_digests import find_damage
from megatron_rl.models.hf_config import architecture_from_hf, is_classifier, read_generation, read_hf_config
from megatron_rl.models.job_arguments import architecture_from_arguments, arguments_from_architecture
from megatron_rl.models.layouts import hf_layout, logical_tensors, megatron_layout
from megatron_rl.models.local_tensors import chunk_tensors, naming_of
from megatron_rl.models.parameters import whole
from megatron_rl.models.pipeline import padded_vocab
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.parallel.agreement import Agreement
from megatron_rl.reshard.layout import restricted
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.hf_folder import MAX_SHARD_BYTES, HFDescription, HFFolderWriter
from megatron_rl.weights.hf_in import SCORE, check_folder, resolve_folder
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint, differences
from megatron_rl.weights.source import SafetensorsFolder, TensorSource
from megatron_rl.weights.value_head_file import SECOND_HEAD, read_value_head, write_value_head

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A model to convert."""

    description: HFDescription
    tensors: TensorSource
    dtype: torch.dtype
    value_head: Tensor | None = None  # [1, hidden], of a policy that a critic shares its weights with
    checkpoint: Path | None = None  # the Megatron checkpoint that it is


@contextlib.contextmanager
def open_weights(path: str | Path, config: str | Path | None = None) -> Iterator[Opened]:
    """A Hugging Face folder, a model id, or a Megatron checkpoint.

    Args:
        config: for a checkpoint that carries none: the Hugging Face folder (or its config.json) that describes it.

    Raises:
        ConfigError: it is neither, or nothing says what model the checkpoint holds.
    """
    checkpoint = MegatronCheckpoint.find(path, config, flag="--config")
    if checkpoint is None:
        folder = resolve_folder(path)
        if config is not None:
            raise ConfigError(
                f"--config {config} describes a Megatron checkpoint, but {path} is a Hugging Face folder, which "
                "describes itself: leave --config out"
            )
        description = _describe(folder)
        with SafetensorsFolder(folder) as source:
            check_folder(source, logical_tensors(description.architecture))
            head = read_value_head(folder, description.architecture.hidden)
            yield Opened(description, source, source.dtype("model.embed_tokens.weight"), head)
        return
    reader, description, head = checkpoint.reader, checkpoint.description, None
    if isinstance(reader, CheckpointReader) and SECOND_HEAD in reader.tensors:
        head = reader.read(whole(SECOND_HEAD, SCORE, (1, description.architecture.hidden)))
    yield Opened(description, checkpoint.source, reader.dtype, head, checkpoint.folder)


def convert(
    source: str | Path,
    target: str | Path,
    to: Literal["hf", "megatron"],
    sizes: ParallelSizes | None = None,
    *,
    config: str | Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    verify: bool = True,
) -> Path:
    """Convert ``source`` into the folder ``target``, which appears complete or not at all. Collective under torchrun.

    Args:
        to: "hf" for a Hugging Face folder, "megatron" for a distributed checkpoint.
        sizes: the layout that the ranks hold the model in while a checkpoint is written.
        config: see `open_weights`.
        dtype: of the result; None keeps the source's.
        max_shard_bytes: largest file of a Hugging Face folder.
        overwrite: replace an existing target.
        verify: compare a checkpoint's files with their digests first.

    Returns:
        The target.

    Raises:
        ConfigError: the source is neither of the two, or is damaged.
    """
    if to not in ("hf", "megatron"):
        raise ConfigError(f"cannot convert to {to!r}: expected 'hf' or 'megatron'")
    with open_weights(source, config) as opened:
        writer = HFFolderWriter(target, opened.description, dtype or opened.dtype, max_shard_bytes, overwrite)
        context = ParallelContext.create(sizes or ParallelSizes() if to == "megatron" else ParallelSizes())
        if verify and opened.checkpoint is not None:
            _refuse_damage(opened.checkpoint, context, tensors_only=config is not None)
        if to == "hf":
            _to_hf(opened, writer, context)
        else:
            _to_megatron(opened, writer, context)
    return writer.folder


def _refuse_damage(checkpoint: Path, context: ParallelContext, tensors_only: bool) -> None:
    """Each rank reads its share of the files; raises ConfigError on all. Where the user describes the model, what the
    checkpoint says of itself may have been changed."""
    found = context.gather_objects(find_damage(checkpoint, context.rank, context.world_size, tensors_only))
    if damage := next(filter(None, found), None):
        raise ConfigError(
            f"checkpoint {checkpoint} is damaged: {damage}: restore it from a copy, or convert another one "
            "(--no-verify converts it as it is)"
        )


def _to_hf(opened: Opened, writer: HFFolderWriter, context: ParallelContext) -> None:
    rank, together = context.rank, context.agreement
    layout = hf_layout(opened.description.architecture)
    with _hidden(writer, together, rank):
        with together.attempt():
            for file in writer.files[rank :: context.world_size]:
                part = restricted(layout, set(file.tensors))
                tensors = empty_tensors(part, 0, writer.dtype)
                fill(part, 0, tensors, opened.tensors)
                writer.write(file, tensors)
        with together.attempt():
            if rank == 0:
                if opened.value_head is not None:
                    write_value_head(writer.partial, opened.value_head)
                writer.commit()


def _to_megatron(opened: Opened, writer: HFFolderWriter, context: ParallelContext) -> None:
    a, sizes = opened.description.architecture, context.sizes
    config = transformer_config(a, sizes, dtype=writer.dtype, **_stacked_layers(a))
    head = opened.value_head
    chunks = build_model(
        a, config, pg_collection=context.collection, value_head=a.score_head, second_head=head is not None
    )
    vocab = padded_vocab(a.vocab, sizes.tp)
    layout = megatron_layout(a, context.grid, vocab, naming_of(chunks))
    together = context.agreement
    # One iteration of a run where the target is named as one; else a run with nothing but a release.
    alone = re.fullmatch(rf"iter_\d{{7}}|{RELEASE}", writer.folder.name) is not None
    folder = writer.partial if alone else writer.partial / RELEASE
    with _hidden(writer, together, context.rank):
        with together.attempt():
            if context.rank == 0:
                folder.mkdir(exist_ok=True)
            own = chunk_tensors(chunks)
            fill(layout, context.rank, own, opened.tensors)
            for name in own:
                if head is not None and name.endswith(SECOND_HEAD):
                    own[name].copy_(head)
        save_checkpoint(chunks, folder, _job_state(a, sizes, vocab, writer.dtype, folder.name))
        with together.attempt():
            if context.rank == 0:
                opened.description.write_into(folder, writer.dtype)
                if not alone:
                    (writer.partial / LATEST).write_text(RELEASE)
                writer.publish()
                if alone:
                    point_to(writer.folder)


def _stacked_layers(a: Architecture) -> dict[str, Any]:
    """Megatron-Core stores the layers of a model as one tensor where ``moe_layer_freq`` says that all are alike, which
    a list never does (TransformerBlock.sharded_state_dict); Megatron-LM's default is 1."""
    return {"moe_layer_freq": 1} if a.experts is not None and not a.experts.dense_layers else {}


def _job_state(a: Architecture, sizes: ParallelSizes, vocab: int, dtype: torch.dtype, name: str) -> dict[str, Any]:
    """What Megatron-LM keeps in a checkpoint beside tensors (checkpointing.py generate_state_dict)."""
    arguments = arguments_from_architecture(a, sizes, vocab, dtype)
    other = [f"{ours}={x!r}" for (ours, _), x, _ in differences(a, architecture_from_arguments(arguments, vocab))]
    if other or a.score_head:
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


@contextlib.contextmanager
def _hidden(writer: HFFolderWriter, together: Agreement, rank: int) -> Iterator[None]:
    """Begin the hidden folder, and remove it if the body fails anywhere."""
    with together.attempt():
        if rank == 0:
            writer.begin()
    try:
        yield
    except BaseException:
        if rank == 0:
            writer.abandon()
        raise


def _describe(folder: Path) -> HFDescription:
    config = read_hf_config(folder)
    tokenizer: PreTrainedTokenizerBase | None = None
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(folder)
    architecture = replace(architecture_from_hf(config), score_head=is_classifier(config))
    return HFDescription(architecture, config, tokenizer, read_generation(folder))
