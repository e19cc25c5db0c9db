"""Filling a sharded module with its first weights: from a Hugging Face folder or model, or a Megatron checkpoint.

Each rank reads its own rows only. A value head is looked for under each name that it may have; a source without one
leaves it at zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rl.engines.fsdp2.engine import FSDP2Engine
from megatron_rl.models.components.embedding import SCORE
from megatron_rl.models.hf_module import module_architecture
from megatron_rl.models.layouts import logical_tensors, transformers_layout
from megatron_rl.models.module_architecture import ModuleArchitecture
from megatron_rl.reshard import WireFormat
from megatron_rl.reshard.layout import restricted
from megatron_rl.weights.fill import fill
from megatron_rl.weights.hf_in import add_prefix, check_folder, check_tied
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_rl.weights.source import SafetensorsFolder, TensorSource, dtypes_of, in_memory
from megatron_rl.weights.value_head_file import SHARED_VALUE_HEAD, read_value_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fill_module(
    engine: FSDP2Engine, source: Path | PreTrainedModel | MegatronCheckpoint, own: ModuleArchitecture
) -> bool:
    """Fill a fresh engine.

    Args:
        own: the architecture of its module.

    Returns:
        False where the source has no value head and the model's stays zero.

    Raises:
        ConfigError: a tensor is missing or has another shape.
    """
    rank, tensors = engine.context.rank, engine.tensors()
    with opened(source, own) as weights:
        has_head = not engine.value_model or SCORE in weights
        layout = engine.layout
        if not has_head:
            tensors[SCORE].zero_()
            layout = restricted(layout, logical_tensors(own).keys() - {SCORE})
        if isinstance(weights, SafetensorsFolder):
            check_folder(weights, own if has_head else _without_score(own))
            _check_ties(engine, weights)
        fill(layout, rank, tensors, weights)
    if engine.shared_value_head or not has_head:
        head = read_value_head(source, own.hidden) if isinstance(source, Path) else None
        mine = tensors[SHARED_VALUE_HEAD if engine.shared_value_head else SCORE]
        if head is not None and mine.numel():  # its one row is the first rank's
            mine.copy_(head)
        return head is not None
    return True


def _without_score(own: ModuleArchitecture) -> ModuleArchitecture:
    return replace(own, tensors=tuple(one for one in own.tensors if one.shard.name != SCORE))


def _check_ties(engine: FSDP2Engine, weights: SafetensorsFolder) -> None:
    """Refuse a tied tensor that is stored with values of its own, which would be ignored."""
    shapes = {name: shape for one in engine.module_tensors for name, shape in one.logical}
    for alias, kept in engine.sharded.module.all_tied_weights_keys.items():
        if alias in weights and kept in weights and alias not in shapes and kept in shapes:
            check_tied(weights, kept, alias, shapes[kept])


def module_dtypes(source: Path | PreTrainedModel | MegatronCheckpoint, own: ModuleArchitecture) -> WireFormat:
    """What the weights of a source are stored in."""
    with opened(source, own) as weights:
        return dtypes_of(weights, logical_tensors(own))


@contextlib.contextmanager
def opened(source: Path | PreTrainedModel | MegatronCheckpoint, own: ModuleArchitecture) -> Iterator[TensorSource]:
    """The tensors of a resolved source, by the names of files."""
    if isinstance(source, MegatronCheckpoint):
        yield source.source
    elif isinstance(source, Path):
        with SafetensorsFolder(source) as folder:
            add_prefix(folder, own)
            yield folder
    else:
        given = module_architecture(source)
        state = {name: tensor.detach() for name, tensor in source.state_dict().items()}
        yield in_memory(state, transformers_layout(given))
