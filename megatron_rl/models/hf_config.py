"""Between Hugging Face configs and `Architecture`: reading a folder's config, and writing one for export.

A model from Hugging Face keeps its own config; a model made in Megatron gets a new one.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.family import FAMILIES, NoFamilyError, family_of
from megatron_rl.models.hf_fields import HFFields
from megatron_rl.models.module_architecture import ModuleArchitecture

GENERATION_FILE = "generation_config.json"

if TYPE_CHECKING:  # two CPU-seconds on every rank: it brings flash attention, generation and scipy
    from transformers import PreTrainedModel

    HFModel = PreTrainedModel

HFConfig = PretrainedConfig  # for packages that hold these objects without importing transformers


# Published under a name of their own, though they are of another family to the last number: moonshotai/Kimi-K2-Instruct
# (github.com/MoonshotAI/Kimi-K2, docs/deploy_guidance.md, "Others") names DeepSeek's class and code.
SAME_AS = {"kimi_k2": "deepseek_v3"}


def read_hf_config(folder: str | Path) -> PretrainedConfig:
    """The config of a Hugging Face folder; that of a model in `SAME_AS` is one of the family that it is.

    Raises:
        ConfigError: there is no readable ``config.json``, or its model type is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: expected a Hugging Face model folder, with config.json")
    read_json_object(path)
    return copy.deepcopy(_checked_config(str(folder), path.read_text(encoding="utf-8")))


@functools.lru_cache(maxsize=16)
def _checked_config(folder: str, text: str) -> PretrainedConfig:
    """Of a ``config.json`` that holds ``text``. Several parts of a job read the same one; transformers takes 30 ms."""
    path, fields = Path(folder) / "config.json", json.loads(text)
    published = fields.get("model_type")
    if not isinstance(published, str):
        given = f"model_type is {published!r}" if "model_type" in fields else "model_type is missing"
        raise ConfigError(
            f"{path}: {given}, so nothing says what model this is: restore the file, or add the model's own, "
            'such as "model_type": "llama"'
        )
    model_type = SAME_AS.get(published, published)
    if model_type not in FAMILIES and model_type not in CONFIG_MAPPING:
        try:
            family_of(model_type)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    HFFields.parse(fields, str(path))
    native = FAMILIES[model_type].published_code if model_type in FAMILIES else ""
    if isinstance(fields.get("auto_map"), dict) and any(
        "Model" in key and not (native and str(code).rpartition("--")[2].startswith(native))
        for key, code in fields["auto_map"].items()
    ):
        raise ConfigError(
            f"{path} names code of its own (auto_map: {fields['auto_map']}), which would be trained and exported "
            "as the stock model: use a model of the stock class, or add its family in megatron_rl/models"
        )
    try:
        if model_type != published:
            own = {key: value for key, value in fields.items() if key != "auto_map"}
            return CONFIG_MAPPING[model_type].from_dict(own | {"model_type": model_type})
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # wrong types raise whatever transformers meets first
        brief = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"{path} is not the config of a {model_type} model ({brief}): restore the file") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not a JSON object ({error!s:.200}): restore the file") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} is not a JSON object, but holds a {type(fields).__name__}: restore the file")
    return fields


class GenerationFile(GenerationConfig):
    """``generation_config.json`` of a model, written as it was read: `transformers` would change fields
    of other versions."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.fields = dict(fields)

    @property
    def stops(self) -> tuple[int, ...]:
        """Its end-of-sequence tokens."""
        return eos_ids(self.fields.get("eos_token_id"))

    def add_stop(self, token: int | None) -> None:
        """Add one end-of-sequence token if it names any."""
        if self.stops and token is not None and token not in self.stops:
            self.fields["eos_token_id"] = [*self.stops, token]

    def save_pretrained(self, save_directory: Any, *_: Any, **__: Any) -> None:
        text = json.dumps(self.fields, indent=2) + "\n"
        (Path(save_directory) / GENERATION_FILE).write_text(text, encoding="utf-8")


def read_generation(source: Path | PreTrainedModel) -> GenerationFile | None:
    """The generation settings of a Hugging Face folder or model; None where it has none of its own.

    Raises:
        ConfigError: the file is not a JSON object, or its ``eos_token_id`` is neither an integer nor a list of them.
    """
    if not isinstance(source, Path):
        config = getattr(source, "generation_config", None)  # value models have none
        if config is None or config._from_model_config:
            return None
        return GenerationFile(json.loads(config.to_json_string()))
    path = source / GENERATION_FILE
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(fields, dict):
            raise ValueError(f"it holds a {type(fields).__name__}, expected a JSON object")
        eos_ids(fields.get("eos_token_id"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be used ({error}): restore the file") from None
    return GenerationFile(fields)


def eos_ids(value: Any) -> tuple[int, ...]:
    """``eos_token_id`` as configs hold it (absent, one, or several) -> all of them.

    Raises:
        ValueError: it is something else.
    """
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ValueError(f"eos_token_id is {value!r}, expected a token id or a list of them")
    return ids


def architecture_from_hf(config: PretrainedConfig) -> Architecture:
    """Translate a Hugging Face config.

    Raises:
        ConfigError: the model type is not supported, or the config asks for what its family does not compute.
    """
    return family_of(_family_name(config)).architecture(config.to_dict())


def _family_name(config: PretrainedConfig) -> str:
    """The model type; of a config class of the user's own that of the class of `transformers` that it derives from."""
    kinds = [kind for kind in type(config).__mro__ if issubclass(kind, PretrainedConfig)]
    own = [kind for kind in kinds if not kind.__module__.startswith("transformers.")]
    derived = kinds[len(own)].model_type if own else ""
    return derived if derived in FAMILIES else config.model_type


def best_architecture(config: PretrainedConfig) -> Architecture:
    """That of the config's family, or where no family computes it that of its module in `transformers`.

    Raises:
        ConfigError: there is no such module either, or the config cannot be used.
    """
    try:
        return architecture_from_hf(config)
    except NoFamilyError as none:
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "quantization_config", None) is not None:
            raise
        # At run time only: it imports all of transformers' modelling code, 2 CPU-seconds that most jobs do not need.
        from megatron_rl.models.hf_module import architecture_of_config

        try:
            return architecture_of_config(config)
        except ConfigError as error:
            raise ConfigError(f"{none}; nor can it be trained as a module of transformers: {error}") from None


def module_config(
    architecture: ModuleArchitecture, config: Any, tokenizer: Any = None, dtype: str = "float32"
) -> PretrainedConfig:
    """The config of a module that is exported.

    Args:
        config: of the model it came from, or its fields; None: the architecture's own.
    """
    given = config or json.loads(architecture.config_json)
    fields = given.to_dict() if isinstance(given, PretrainedConfig) else dict(given)
    found: PretrainedConfig = architecture.config_class.from_dict(fields)
    found.architectures, found.dtype = [architecture.module_class.__name__], dtype
    if architecture.value_model:
        found.num_labels = 1
        if tokenizer is not None:
            found.pad_token_id = tokenizer.pad_token_id
    return found


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a Hugging Face config is a sequence classifier's: of a reward model or critic."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def described_architecture(config: PretrainedConfig) -> Architecture:
    """`architecture_from_hf`, with a value head in place of the output layer where it is a classifier's."""
    return replace(architecture_from_hf(config), value_model=is_classifier(config))


def hf_config_from(
    architecture: Architecture, tokenizer: PreTrainedTokenizerBase | None = None, dtype: str = "bfloat16"
) -> PretrainedConfig:
    """A Hugging Face config for a model that has none.

    Args:
        tokenizer: gives the special token ids; without it generation has no default stop token.
        dtype: of the exported tensors, as `transformers` spells it ("float32", "bfloat16", "float16").
    """
    fields: dict[str, Any] = family_of(architecture.family).config_fields(architecture)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    fields |= {key: getattr(tokenizer, key) if tokenizer is not None else None for key in special}
    return AutoConfig.for_model(architecture.family, dtype=dtype, **fields)
