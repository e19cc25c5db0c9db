"""`MegatronModel`: Megatron-Core model chunks together with where they stand and what they contain.

Made from a job's own chunks (`from_chunks`) or from a Hugging Face model (`from_hf`). Everything above sees one thing:
chunks for Megatron's schedule, a `ParallelContext`, an `Architecture`, and the weights as named shards of a layout.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.devices import current_platform
from megatron_rl.models import Architecture, MegatronNaming, chunk_tensors, megatron_layout
from megatron_rl.models.adapter import Adapter
from megatron_rl.models.builder import build_model, transformer_config
from megatron_rl.models.hf_config import GenerationFile, architecture_from_hf, read_generation
from megatron_rl.models.lora import LoraSettings, add_adapters
from megatron_rl.models.megatron_architecture import architecture_of_chunk
from megatron_rl.models.megatron_chunk import layer_indices, supports_packing, unwrap
from megatron_rl.models.naming import chunk_prefix
from megatron_rl.models.pipeline import padded_vocab, stage_layers
from megatron_rl.parallel import ParallelContext
from megatron_rl.reshard import Derived, Layout, Readable
from megatron_rl.workers.adoption import (
    check_parameters,
    check_place,
    log_auxiliary_losses,
    warn_of_dropout,
)
from megatron_rl.workers.starting_weights import MegatronCheckpoint, dtype_of, fill_model, hf_config_of, resolved

if TYPE_CHECKING:
    from megatron_rl.models.hf_config import HFConfig, HFModel


@dataclass
class MegatronModel:
    """Chunks of one rank, one per virtual pipeline stage, wrapped (DDP) or bare."""

    chunks: list[torch.nn.Module]
    context: ParallelContext
    architecture: Architecture
    padded_vocab: int  # rows of the embedding over all tensor-parallel ranks
    hf_config: HFConfig | None = None  # of the Hugging Face model it was loaded from
    generation: GenerationFile | None = None  # of that model
    source_dtype: torch.dtype | None = None  # of the weights there
    second_head: bool = False  # the last chunk has a value head beside its output layer
    head_is_new: bool = False  # it has a value head, and where the weights came from there was none
    adapters: dict[str, Adapter] = field(default_factory=dict)  # LoRA: by shard name of the frozen weight

    @classmethod
    def from_hf(
        cls,
        source: str | Path | HFModel | MegatronCheckpoint,
        context: ParallelContext,
        *,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        value_head: bool = False,
        second_head: bool = False,
    ) -> MegatronModel:
        """Build the model in this job's layout and fill it from a Hugging Face folder, an in-memory model or a Megatron
        checkpoint of any layout.

        From files each rank reads only its own part. A value head is that of a sequence classifier with one label, or
        the one that a policy was saved with, and zero where the source has none (`head_is_new`).
        """
        origin = resolved(source)
        hf_config = hf_config_of(origin)
        architecture, sizes = replace(architecture_from_hf(hf_config), score_head=value_head), context.sizes
        device = current_platform().device
        config = transformer_config(architecture, sizes, dtype=dtype, recompute=recompute)
        groups = context.collection
        chunks = build_model(
            architecture, config, pg_collection=groups, device=device, value_head=value_head, second_head=second_head
        )
        vocab = padded_vocab(architecture.vocab, sizes.tp)
        generation = read_generation(origin.hf_folder if isinstance(origin, MegatronCheckpoint) else origin)
        stored = dtype_of(origin)
        model = cls(list(chunks), context, architecture, vocab, hf_config, generation, stored, second_head)
        model.head_is_new = not fill_model(model, origin)
        return model

    @classmethod
    def from_chunks(
        cls, chunks: Sequence[torch.nn.Module], context: ParallelContext, vocab: int, value_head: bool = False
    ) -> MegatronModel:
        """Adopt a job's own `GPTModel` chunks, wrapped or not.

        Args:
            vocab: logical vocabulary, without padding: usually ``len(tokenizer)``.
            value_head: the last chunk's output layer is a `models.value_head.ValueHead`.

        Raises:
            ConfigError: on every rank: the chunks compute what no supported decoder does, or do not hold the layers
                that their place in the pipeline asks for, or not that head.
        """
        inner = [unwrap(chunk) for chunk in chunks]
        with context.attempt("taking over the model"):
            check_place(inner, context, value_head)
            architecture = replace(architecture_of_chunk(inner[0], vocab), score_head=value_head)
            for other in inner[1:]:
                architecture_of_chunk(other, vocab)
            model = cls(list(chunks), context, architecture, int(inner[0].vocab_size))
            model.check_layers()
            check_parameters(model.layout, context.rank, model.tensors())
        warn_of_dropout(model.config)
        log_auxiliary_losses(model.config)
        return model

    @property
    def value_head(self) -> bool:
        """Whether the output layer is one number a position instead of the vocabulary."""
        return self.architecture.score_head

    @property
    def config(self) -> TransformerConfig:
        return unwrap(self.chunks[0]).config  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return current_platform().device

    @property
    def last_chunk(self) -> torch.nn.Module:
        """The bare chunk with the output layer, on the last pipeline stage."""
        return unwrap(self.chunks[-1])

    @property
    def last_prefix(self) -> str:
        """What precedes the names of the last chunk's tensors."""
        return chunk_prefix(len(self.chunks) - 1, len(self.chunks))

    @functools.cached_property
    def packs(self) -> bool:
        """Whether the core attention takes packed sequences (Megatron's plain `DotProductAttention` does not)."""
        return all(supports_packing(chunk) for chunk in self.chunks)

    @functools.cached_property
    def naming(self) -> MegatronNaming:
        return MegatronNaming.detect(self.tensors())

    @functools.cached_property
    def layout(self) -> Layout:
        """Where every rank's shards of the logical tensors sit."""
        return self.layout_of(output_layer=True)

    def layout_of(self, output_layer: bool) -> Layout:
        """The same with or without the output layer."""
        architecture = self.architecture if output_layer else replace(self.architecture, score_head=False)
        grid = self.context.grid
        return megatron_layout(architecture, grid, self.padded_vocab, self.naming, output_layer=output_layer)

    def tensors(self) -> dict[str, Tensor]:
        """This rank's weights by shard name: views that see every later update."""
        return chunk_tensors(self.chunks)

    def published(self) -> dict[str, Readable]:
        """The same as they leave the trainer: with adapters merged into the frozen weights, which are not changed.

        Each is merged when it is read, so never are two copies of the model held.
        """
        tensors = self.tensors()
        return tensors | {
            name: Derived(tensors[name], functools.partial(adapter.merged, tensors[name]))
            for name, adapter in self.adapters.items()
        }

    def add_lora(self, settings: LoraSettings, seed: int) -> None:
        """Freeze the weights and train adapters instead; before the chunks are wrapped. See `models.lora`."""
        self.adapters = add_adapters(self.chunks, settings, seed)

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """While open, the model computes with its frozen weights alone, without adapters."""
        for adapter in self.adapters.values():
            adapter.enabled = False
        try:
            yield
        finally:
            for adapter in self.adapters.values():
                adapter.enabled = True

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The same by the same names, as the parameters themselves."""
        return {
            chunk_prefix(index, len(self.chunks)) + name: parameter
            for index, chunk in enumerate(self.chunks)
            for name, parameter in unwrap(chunk).named_parameters()
        }

    def check_layers(self) -> None:
        """Raise ConfigError unless each chunk holds the layers that the layout says it does."""
        sizes, at = self.context.sizes, self.context.coordinates
        for stage, chunk in enumerate(self.chunks):
            expected = list(stage_layers(self.architecture.num_layers, sizes.pp, sizes.vpp, at.pp, stage))
            layers = list(layer_indices(chunk))
            if layers != expected:
                raise ConfigError(
                    f"pipeline stage {at.pp} chunk {stage} holds layers {layers}, expected {expected}: build the model "
                    "with evenly divided stages (the first stages one layer longer where they do not divide)"
                )

    def sync_parameters(self) -> None:
        """Finish a pending all-gather of updated parameters (distributed optimizer with overlap)."""
        for chunk in self.chunks:
            if getattr(getattr(chunk, "ddp_config", None), "overlap_param_gather", False):
                chunk.start_param_sync(force_sync=True)  # type: ignore[operator]
