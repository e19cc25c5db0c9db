"""`convert`: a Hugging Face folder or a Megatron distributed checkpoint into either of the two.

To Hugging Face it streams: one parameter and one output file are in memory at a time, and under torchrun the ranks
share the files. To Megatron each rank holds its part of the model in the asked-for layout, read straight from the
source; the checkpoint itself fits any layout. A converted checkpoint carries the model's config and tokenizer in its
sub-folder ``hf``, so that it converts back without being told what it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from megatron_rl.config import ConfigError
from megatron_rl.models.builder import build_model, transformer_config
from megatron_rl.models.checkpoint import CheckpointReader, checkpoint_folder, save_checkpoint
from megatron_rl.models.hf_config import architecture_from_hf, is_classifier, read_hf_config
from megatron_rl.models.layouts import hf_layout, megatron_layout
from megatron_rl.models.local_tensors import chunk_tensors, naming_of
from megatron_rl.models.parameters import whole
from megatron_rl.models.pipeline import padded_vocab
from megatron_rl.parallel import ParallelContext, ParallelSizes, RankGrid
from megatron_rl.reshard import LocalTransport, P2PTransport
from megatron_rl.reshard.layout import restricted
from megatron_rl.weights.agreement import Agreement
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.hf_folder import DESCRIPTION_FOLDER, MAX_SHARD_BYTES, HFDescription, HFFolderWriter
from megatron_rl.weights.hf_in import SCORE, resolve_folder
from megatron_rl.weights.source import LayoutSource, SafetensorsFolder, TensorSource
from megatron_rl.weights.value_head_file import SECOND_HEAD, read_value_head, write_value_head


@dataclass(frozen=True)
class Opened:
    """A model to convert."""

    description: HFDescription
    tensors: TensorSource
    dtype: torch.dtype
    value_head: Tensor | None = None  # [1, hidden], of a policy that a critic shares its weights with


@contextlib.contextmanager
def open_weights(path: str | Path, config: str | Path | None = None) -> Iterator[Opened]:
    """A Hugging Face folder, a model id, or a Megatron checkpoint.

    Args:
        config: for a checkpoint that carries none: the Hugging Face folder (or its config.json) that describes it.

    Raises:
        ConfigError: it is neither, or nothing says what model the checkpoint holds.
    """
    checkpoint = checkpoint_folder(path)
    if checkpoint is None:
        folder = resolve_folder(path)
        description = _describe(folder)
        with SafetensorsFolder(folder) as source:
            head = read_value_head(folder, description.architecture.hidden)
            yield Opened(description, source, source.dtype("model.embed_tokens.weight"), head)
        return
    described = Path(config) if config is not None else checkpoint / DESCRIPTION_FOLDER
    if not described.exists():
        raise ConfigError(
            f"{checkpoint} does not say what model it holds: pass config=<a Hugging Face folder or config.json> of the "
            "same architecture"
        )
    description = _describe(described.parent if described.is_file() else described)
    reader = CheckpointReader(checkpoint)
    layout = megatron_layout(description.architecture, RankGrid(ParallelSizes(), 1), reader.padded_vocab)
    head = None
    if SECOND_HEAD in reader.tensors:
        head = reader.read(whole(SECOND_HEAD, SCORE, (1, description.architecture.hidden)))
    yield Opened(description, LayoutSource(layout, 0, reader.read), reader.dtype, head)


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
) -> Path:
    """Convert ``source`` into the folder ``target``, which appears complete or not at all. Collective under torchrun.

    Args:
        to: "hf" for a Hugging Face folder, "megatron" for a distributed checkpoint.
        sizes: the layout that the ranks hold the model in while a checkpoint is written.
        config: see `open_weights`.
        dtype: of the result; None keeps the source's.
        max_shard_bytes: largest file of a Hugging Face folder.
        overwrite: replace an existing target.

    Returns:
        The target.
    """
    if to not in ("hf", "megatron"):
        raise ConfigError(f"cannot convert to {to!r}: expected 'hf' or 'megatron'")
    with open_weights(source, config) as opened:
        writer = HFFolderWriter(target, opened.description, dtype or opened.dtype, max_shard_bytes, overwrite)
        if to == "hf":
            _to_hf(opened, writer)
        else:
            _to_megatron(opened, writer, sizes or ParallelSizes())
    return writer.folder


def _to_hf(opened: Opened, writer: HFFolderWriter) -> None:
    context = ParallelContext.create(ParallelSizes())
    rank, together = context.rank, _agreement(context)
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


def _to_megatron(opened: Opened, writer: HFFolderWriter, sizes: ParallelSizes) -> None:
    a = opened.description.architecture
    context = ParallelContext.create(sizes)
    config = transformer_config(a, sizes, dtype=writer.dtype)
    head = opened.value_head
    chunks = build_model(
        a, config, pg_collection=context.collection, value_head=a.score_head, second_head=head is not None
    )
    layout = megatron_layout(a, context.grid, padded_vocab(a.vocab, sizes.tp), naming_of(chunks))
    together = _agreement(context)
    with _hidden(writer, together, context.rank):
        with together.attempt():
            own = chunk_tensors(chunks)
            fill(layout, context.rank, own, opened.tensors)
            for name in own:
                if head is not None and name.endswith(SECOND_HEAD):
                    own[name].copy_(head)
        save_checkpoint(chunks, writer.partial)
        with together.attempt():
            if context.rank == 0:
                opened.description.write_into(writer.partial, writer.dtype)
                writer.publish()


def _agreement(context: ParallelContext) -> Agreement:
    several = context.world_size > 1
    transport = P2PTransport(context.host_group) if several else LocalTransport()
    return Agreement(transport, range(context.world_size), context.rank)


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
        tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = None
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    architecture = replace(architecture_from_hf(config), score_head=is_classifier(config))
    return HFDescription(architecture, config, tokenizer, generation)
