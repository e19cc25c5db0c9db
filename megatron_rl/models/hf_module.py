"""Modules of `transformers`: their class, an empty one, and which rows of its files' tensors each of its own holds.

In memory `transformers` 5 fuses what its files keep apart, experts above all. Its conversion table is read backwards
here: numbered rows in place of weights are converted to the names of files, and where a number comes out is where that
row is stored. So there is no second table that could differ from theirs.
"""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from megatron_rl.config import ConfigError
from megatron_rl.models.module_architecture import ModuleArchitecture, ModuleTensor
from megatron_rl.reshard.layout import Shard, Span, matrix_shape

if TYPE_CHECKING:  # see `hf_config`
    from transformers import PreTrainedModel

UNLIMITED = 1 << 20  # positions of a model whose config names no limit (ALiBi)


def module_class_of(config: PretrainedConfig, value_model: bool = False) -> type[PreTrainedModel]:
    """The class that `transformers` builds for a config: the one that the config names, or the first that fits.

    Raises:
        ConfigError: there is no class of this kind.
    """
    mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if value_model else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        what = "sequence classifier, which critics and reward models are" if value_model else "causal language model"
        raise ConfigError(f"transformers has no {what} for model type {config.model_type!r}: use another model")
    found: Any = mapping[type(config)]
    classes: list[type[PreTrainedModel]] = list(found) if isinstance(found, tuple) else [found]
    named = [cls for cls in classes if cls.__name__ in (config.architectures or ())]
    return (named or classes)[0]


def build_module(config: PretrainedConfig, cls: type[PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    """The module, its weights without particular values, its buffers as they should be. On the CPU memory of weights
    is taken only when they are written.

    Raises:
        ConfigError: `transformers` cannot make one of this config.
    """
    with no_init_weights():
        try:
            module = cls._from_config(config, dtype=dtype)
        except Exception as error:  # whatever the class raises for values that it does not know
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(
                f"{cls.__name__} of transformers cannot be built from this config.json ({said:.300}): correct it"
            ) from error
    module.tie_weights()
    return module


def module_architecture(module: PreTrainedModel, value_model: bool = False) -> ModuleArchitecture:
    """The architecture of a module, which may be on the meta device.

    Raises:
        ConfigError: as `module_tensors`.
    """
    config = module.config
    text: Any = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 1  # 1 where there is no attention: for limits only
    return ModuleArchitecture(
        family=config.model_type,
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        ffn=getattr(text, "intermediate_size", None) or 0,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        max_positions=getattr(text, "max_position_embeddings", None) or UNLIMITED,
        value_model=value_model,
        tensors=module_tensors(module),
        config_json=json.dumps(config.to_dict(), sort_keys=True),
        config_class=type(config),
        module_class=type(module),
    )


def architecture_of_config(config: PretrainedConfig, value_model: bool = False) -> ModuleArchitecture:
    """The same from a config; its weights exist nowhere."""
    with torch.device("meta"):
        module = build_module(config, module_class_of(config, value_model), torch.float32)
    return module_architecture(module, value_model)


def module_of(architecture: ModuleArchitecture, dtype: torch.dtype) -> PreTrainedModel:
    """A new module, as `build_module` makes them."""
    config = architecture.config_class.from_dict(json.loads(architecture.config_json))
    return build_module(config, architecture.module_class, dtype)


def module_tensors(module: PreTrainedModel) -> tuple[ModuleTensor, ...]:
    """Of tied parameters the first stands for all.

    Raises:
        ConfigError: a tensor is stored in a form that is no rearrangement of rows of the module's.
    """
    held = stored_tensors(module)
    names, starts, numbered, count = list(held), [], {}, 0
    for name, tensor in held.items():
        shape = (*tensor.shape[:-1], 1) if tensor.dim() > 1 else tuple(tensor.shape)
        numbered[name] = torch.arange(count, count + math.prod(shape), device="cpu").view(shape)
        starts.append(count)
        count += math.prod(shape)
    spans: dict[str, list[Span]] = {name: [] for name in names}
    logical: dict[str, list[tuple[str, tuple[int, ...]]]] = {name: [] for name in names}
    for stored, rows in revert_weight_conversion(module, numbered).items():
        owners = set()
        for number, start, stop in _runs(rows, torch.tensor(starts, device="cpu")):
            index = bisect_right(starts, number) - 1
            cols = matrix_shape(tuple(held[names[index]].shape))[1]
            spans[names[index]].append(Span(stored, start, stop, 0, cols, number - starts[index], 0))
            owners.add(names[index])
        for owner in owners:
            logical[owner].append((stored, _stored_shape(module, stored, rows, held[owner])))
    trained = {name for name, _ in module.named_parameters()}
    return tuple(
        ModuleTensor(
            shard=Shard(name, tuple(tensor.shape), tuple(sorted(spans[name], key=lambda span: span.row))),
            logical=tuple(logical[name]),
            dtype=None if name in trained else tensor.dtype,
            trained=name in trained,
        )
        for name, tensor in held.items()
    )


def stored_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters, and the buffers that files hold, each by the first of its names."""
    parameters = dict(module.named_parameters())
    aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name: value for name, value in module.state_dict().items() if name not in aliases}
    return parameters | buffers


def _stored_shape(module: PreTrainedModel, stored: str, rows: Tensor, owner: Tensor) -> tuple[int, ...]:
    if owner.dim() < 2:
        return tuple(rows.shape)
    if rows.dim() < 2 or rows.shape[-1] != 1:
        raise ConfigError(
            f"{type(module).__name__} stores {stored} transposed or otherwise rearranged against its module, which is "
            "not supported here: export the model with save_original_format=False, or train it with transformers"
        )
    return (*rows.shape[:-1], owner.shape[-1])


def _runs(rows: Tensor, starts: Tensor) -> Iterator[tuple[int, int, int]]:
    """Runs of consecutive numbers of one tensor, each of which begins at one of ``starts``: (first number, first index,
    index after the last)."""
    flat = rows.reshape(-1)
    new = (flat.diff() != 1) | torch.isin(flat[1:], starts)
    cuts = [0, *(torch.nonzero(new).flatten() + 1).tolist(), flat.numel()]
    for start, stop in itertools.pairwise(cuts):
        yield int(flat[start]), start, stop
