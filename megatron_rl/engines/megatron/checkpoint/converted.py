"""A converted model as a Megatron checkpoint that fits any layout: a run's folder as Megatron-LM's ``--load`` takes it.

The iteration's sub-folder ``hf`` carries the model's config and tokenizer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_rl.engines.megatron.checkpoint.writer import CheckpointWriter
from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.engines.megatron.model.model_chunk import chunk_tensors, naming_of, unwrap
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.checkpoint_reader import LATEST, RELEASE, point_to
from megatron_rl.models.components.mla import LATENT_EPS
from megatron_rl.models.job_arguments import architecture_from_arguments, arguments_from_architecture
from megatron_rl.models.layouts import megatron_layout
from megatron_rl.models.naming import chunk_prefix
from megatron_rl.models.pipeline import padded_vocab
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.reshard import Layout, WireFormat
from megatron_rl.weights.fill import fill
from megatron_rl.weights.hf_folder import HFFolderWriter
from megatron_rl.weights.megatron_checkpoint import differences
from megatron_rl.weights.opened_weights import OpenedWeights
from megatron_rl.weights.value_head_file import SHARED_VALUE_HEAD

logger = logging.getLogger(__name__)

NUMBERS = re.compile(r"^chunk\d+\.|(?<=\.)\d+(?=\.)|(?<=weight)\d+$")  # of chunk, layer and expert


def write_converted(opened: OpenedWeights, writer: HFFolderWriter, context: ParallelContext) -> None:
    """Write the Megatron checkpoint; each rank reads and holds its part of the model. Collective."""
    a, sizes = opened.description.architecture, context.sizes
    dtype = writer.dtypes.dtype
    config = transformer_config(a, sizes, dtype=dtype, **_stacked_layers(a))
    head = opened.value_head
    chunks = build_model(
        a, config, pg_collection=context.collection, value_head=a.value_model, shared_value_head=head is not None
    )
    vocab = padded_vocab(a.vocab, sizes.tp)
    layout = megatron_layout(a, context.grid, vocab, naming_of(chunks))
    _set_dtypes(chunks, layout, writer.dtypes)
    together = context.agreement
    # A target named like an iteration is one iteration of a run; any other is a run that holds only a release.
    alone = re.fullmatch(rf"iter_\d{{7}}|{RELEASE}", writer.folder.name) is not None
    folder = writer.partial if alone else writer.partial / RELEASE
    with writer.writing(together, context.rank == 0):
        with together.attempt():
            if context.rank == 0:
                folder.mkdir(exist_ok=True)
            own = chunk_tensors(chunks)
            fill(layout, context.rank, own, opened.tensors)
            for name in own:
                if head is not None and name.endswith(SHARED_VALUE_HEAD):
                    own[name].copy_(head)
        _save_weights(chunks, folder, _job_state(a, sizes, vocab, dtype, folder.name))
        with together.attempt():
            if context.rank == 0:
                opened.description.write_into(folder, dtype)
                if not alone:
                    (writer.partial / LATEST).write_text(RELEASE)
                writer.publish()
                if alone:
                    point_to(writer.folder)


def _set_dtypes(chunks: Sequence[nn.Module], layout: Layout, dtypes: WireFormat) -> None:
    """Give the parameters of a rank's chunks the dtypes of their logical tensors. Megatron-Core stores the layers of a
    model, and the experts of a layer, as one tensor: what differs there gets the widest dtype of all."""
    if not dtypes.exceptions:
        return
    kinds: dict[str, torch.dtype] = {}
    for replica in layout.replicas:
        for shard in layout.shards_of(replica):
            kind = NUMBERS.sub("*", shard.name)
            for span in shard.spans:
                kinds[kind] = torch.promote_types(kinds.get(kind, dtypes.of(span.tensor)), dtypes.of(span.tensor))
    for index, chunk in enumerate(chunks):
        for name, parameter in unwrap(chunk).named_parameters():
            kind = NUMBERS.sub("*", chunk_prefix(index, len(chunks)) + name)
            parameter.data = parameter.data.to(kinds.get(kind, parameter.dtype))


def _stacked_layers(a: Architecture) -> dict[str, Any]:
    """Megatron-Core stores the layers of a model as one tensor where ``moe_layer_freq`` says that all are alike, which
    a list never does (TransformerBlock.sharded_state_dict); Megatron-LM's default is 1."""
    return {"moe_layer_freq": 1} if a.experts is not None and not a.experts.dense_layers else {}


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


def _save_weights(chunks: Sequence[nn.Module], folder: Path, common: Mapping[str, Any]) -> None:
    """Write the weights of a rank's chunks into the empty ``folder``. Collective over the job's ranks.

    The state has Megatron-LM's form: ``model``, or ``model0``, ``model1``, ... for interleaved chunks.

    Args:
        common: what to store beside tensors, the same on every rank.
    """
    names = [f"model{index}" if len(chunks) > 1 else "model" for index in range(len(chunks))]
    state: dict[str, Any] = dict(common)
    state |= {name: unwrap(chunk).sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}
    writer = CheckpointWriter(folder)
    request = writer.begin(state)
    request.add_finalize_fn(writer.complete)
    request.execute_sync()
