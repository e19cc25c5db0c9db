"""Between Hugging Face configs and `Architecture`: reading a folder's config, and writing one for export.

Where a model came from Hugging Face its own config travels with it; a model born in Megatron gets a fresh one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.family import family_of

HFConfig = PretrainedConfig  # for rooms that hold these objects without importing transformers
HFModel = PreTrainedModel


def read_hf_config(folder: str | Path) -> PretrainedConfig:
    """The config of a Hugging Face folder.

    Raises:
        ConfigError: there is no readable ``config.json``, or its model type is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: expected a Hugging Face model folder, with config.json")
    try:
        model_type = json.loads(path.read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a JSON object ({error}): restore the file") from None
    family_of(str(model_type))  # before transformers, whose message would not name our families
    return AutoConfig.from_pretrained(folder)


def architecture_from_hf(config: PretrainedConfig) -> Architecture:
    """Translate a Hugging Face config.

    Raises:
        ConfigError: the model type is not supported, or the config asks for what its family does not compute.
    """
    return family_of(config.model_type).architecture(config.to_dict())


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a Hugging Face config is a sequence classifier's: of a reward model or critic."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def hf_config_from(
    architecture: Architecture, tokenizer: PreTrainedTokenizerBase | None = None, dtype: str = "bfloat16"
) -> PretrainedConfig:
    """A Hugging Face config for a model that never had one.

    Args:
        tokenizer: gives the special token ids; without it generation has no default stop token.
        dtype: of the exported tensors, as `transformers` spells it ("float32", "bfloat16", "float16").
    """
    fields: dict[str, Any] = family_of(architecture.family).config_fields(architecture)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    fields |= {key: getattr(tokenizer, key) if tokenizer is not None else None for key in special}
    return AutoConfig.for_model(architecture.family, dtype=dtype, **fields)
