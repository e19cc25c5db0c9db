"""`MegatronCheckpoint`: a checkpoint that Megatron-LM or this package wrote, and what says which model it holds.

The model is described by, in this order: the config that the user names, the description that this package put beside
its weights (``hf`` in the checkpoint), or Megatron-LM's own arguments in it. A config that contradicts what the
checkpoint says of itself is refused: equal shapes are no proof of an equal model.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.checkpoint_reader import CheckpointReader, checkpoint_folder, open_checkpoint
from megatron_rl.models.hf_config import (
    best_architecture,
    described_architecture,
    hf_config_from,
    is_classifier,
    read_generation,
    read_hf_config,
)
from megatron_rl.models.job_arguments import architecture_from_arguments, arguments_to_add
from megatron_rl.models.legacy_checkpoint import LegacyCheckpoint
from megatron_rl.models.module_checkpoint import ModuleCheckpoint
from megatron_rl.weights.hf_folder import DESCRIPTION_FOLDER, HFDescription
from megatron_rl.weights.source import LayoutSource

# Field of Architecture or Experts -> Hugging Face's key, and Megatron-LM's argument.
NAMES = {
    "num_layers": ("num_hidden_layers", "num_layers"),
    "hidden": ("hidden_size", "hidden_size"),
    "ffn": ("intermediate_size", "ffn_hidden_size"),
    "num_heads": ("num_attention_heads", "num_attention_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_query_groups"),
    "head_dim": ("head_dim", "kv_channels"),
    "norm_eps": ("rms_norm_eps", "layernorm_epsilon"),
    "rope_theta": ("rope_theta", "rotary_base"),
    "o_bias": ("attention bias of the output projection", "add_bias_linear"),
    "mlp_bias": ("mlp_bias", "add_bias_linear"),
    "rotary_fraction": ("partial_rotary_factor", "rotary_percent"),
    "rope_scaling": ("rope_parameters", "use_rope_scaling"),
    "tied": ("tie_word_embeddings", "not untie_embeddings_and_output_weights"),
    "qkv_bias": ("attention bias", "add_qkv_bias"),
    "qk_norm": ("query and key norms", "qk_layernorm"),
    "window": ("sliding_window", "window_size"),
    "full_layers": ("layers without a window (layer_types)", "window_attn_skip_freq"),
    "num_experts": ("num_experts", "num_experts"),
    "experts_per_token": ("num_experts_per_tok", "moe_router_topk"),
    "normalize_weights": ("norm_topk_prob", "not moe_router_pre_softmax"),
    "dense_layers": ("layers without experts", "moe_layer_freq"),
}
FREE = ("family", "vocab", "max_positions", "value_model")  # what two descriptions of one model may call differently


@dataclass(frozen=True)
class MegatronCheckpoint:
    """Weights in a Megatron checkpoint of the format torch_dist or torch.

    Attributes:
        folder: of one iteration.
        config: the Hugging Face folder or config.json that the user says describes the model, if any.
        flag: how the user says so, for messages.
    """

    folder: Path
    config: Path | None = None
    flag: str = "model_config_path"

    @classmethod
    def find(
        cls, path: str | Path, config: str | Path | None = None, flag: str = "model_config_path"
    ) -> MegatronCheckpoint | None:
        """The checkpoint at ``path``, or the newest one of a Megatron-LM run there; None where there is none.

        Raises:
            ConfigError: nothing says what model it holds, or what says so is contradicted or not supported.
        """
        folder = checkpoint_folder(path)
        if folder is None:
            return None
        found = cls(folder, Path(config) if config is not None else None, flag)
        assert found.architecture, "describes itself, or raises"
        return found

    @functools.cached_property
    def reader(self) -> CheckpointReader | LegacyCheckpoint:
        """The reader of the checkpoint's format."""
        found = open_checkpoint(self.folder)
        is_module = isinstance(found, CheckpointReader) and ModuleCheckpoint.fits(found)
        return ModuleCheckpoint(self.folder) if is_module else found

    @functools.cached_property
    def source(self) -> LayoutSource:
        """The weights as logical tensors.

        Raises:
            ConfigError: the checkpoint holds another model than its description says.
        """
        reader = self.reader
        return LayoutSource(reader.layout(self.architecture), reader.ranks, reader.load_part, reader.dtype_of)

    @functools.cached_property
    def architecture(self) -> Architecture:
        """What model it holds.

        Raises:
            ConfigError: see `find`.
        """
        if self._described is None:
            return self._own_architecture()
        architecture = _architecture(self._described, isinstance(self.reader, ModuleCheckpoint))
        if self.config is not None:
            self._refuse_contradictions(architecture)
        return architecture

    @functools.cached_property
    def hf_config(self) -> PretrainedConfig:
        """The model's Hugging Face config: the one that describes it, or one made for it."""
        if self._described is not None:
            return read_hf_config(self._described)
        return hf_config_from(self.architecture, self.tokenizer, str(self.reader.dtype).removeprefix("torch."))

    @property
    def hf_folder(self) -> Path:
        """The Hugging Face folder that describes it; the checkpoint's own where only Megatron-LM's arguments do."""
        return self._described or self.folder

    @property
    def tokenizer_folder(self) -> Path:
        """Where a tokenizer may lie: beside the description, or where Megatron-LM's arguments say."""
        if self._described is not None:
            return self._described
        named = self._arguments.tokenizer_model if self._has_hf_tokenizer else None
        return Path(named) if named and Path(named).is_dir() else self.folder

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer in `tokenizer_folder`, None where there is none."""
        folder = self.tokenizer_folder
        return AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer_config.json").is_file() else None

    @property
    def description(self) -> HFDescription:
        """Everything that a Hugging Face folder of this model holds beside tensors."""
        generation = read_generation(self._described) if self._described is not None else None
        if self._described is None:
            return HFDescription(self.architecture, None, self.tokenizer, generation)
        tokenizer = self.tokenizer if self.architecture.value_model else None
        return HFDescription(self.architecture, self.hf_config, tokenizer, generation, self.tokenizer_folder)

    @functools.cached_property
    def _described(self) -> Path | None:
        """The Hugging Face folder that describes it."""
        if self.config is not None:
            if not self.config.exists():
                raise ConfigError(f"{self.flag} {self.config}: no such file or folder; expected a config.json")
            return self.config.parent if self.config.is_file() else self.config
        own = self.folder / DESCRIPTION_FOLDER
        return own if own.is_dir() else None

    @property
    def _arguments(self) -> Namespace:
        arguments = self.reader.arguments
        if arguments is None:
            ask = f"pass {self.flag} with" if self.flag.startswith("-") else f"set {self.flag} to"
            raise ConfigError(
                f"the Megatron checkpoint {self.folder} does not say what model it holds (it has no arguments of "
                f"Megatron-LM): {ask} a Hugging Face folder or config.json of the same architecture"
            )
        return arguments

    @property
    def _has_hf_tokenizer(self) -> bool:
        return getattr(self._arguments, "tokenizer_type", None) == "HuggingFaceTokenizer"

    def _own_architecture(self) -> Architecture:
        """What Megatron-LM's arguments in it say. Rows that only pad the embedding count as tokens: nothing tells them
        apart, and Megatron-LM computes them too."""
        try:
            return architecture_from_arguments(self._arguments, self.reader.padded_vocab)
        except ConfigError as error:
            raise ConfigError(f"{self.folder}: {error}") from None

    def _refuse_contradictions(self, given: Architecture) -> None:
        """Raise ConfigError where the user's config and the checkpoint's own word differ."""
        described = self.folder / DESCRIPTION_FOLDER
        if described.is_dir():
            own, where = _architecture(described), str(described)
        elif self.reader.arguments is not None:
            own, where = self._own_architecture(), "the checkpoint's arguments"
        else:
            return
        said = [f"{ours}={a!r}, but {theirs}={b!r}" for (ours, theirs), a, b in differences(given, own)]
        if said:
            raise ConfigError(
                f"{self.flag} {self.config} belongs to another model than {where}: {'; '.join(said)}: leave "
                f"{self.flag} out, or give the config of this model"
            )


def load_options(folder: Path) -> str:
    """The command-line options with which Megatron-LM starts from ``folder``, which `convert` wrote."""
    found = MegatronCheckpoint.find(folder)
    assert found is not None, "it was written a moment ago"
    run = folder.parent if found.folder == folder else folder
    return " ".join(["--load", str(run), "--use-checkpoint-args", *arguments_to_add(found._arguments)])


def _architecture(folder: Path, of_module: bool = False) -> Architecture:
    """What a folder describes; ``of_module``: its model need not have a family."""
    config = read_hf_config(folder)
    if of_module:
        return replace(best_architecture(config), value_model=is_classifier(config))
    return described_architecture(config)


def differences(a: Architecture, b: Architecture) -> Iterator[tuple[tuple[str, str], object, object]]:
    """The fields in which two descriptions are different models: Hugging Face's and Megatron-LM's name, both values."""
    for field in fields(Architecture):
        ours, theirs = getattr(a, field.name), getattr(b, field.name)
        if field.name == "experts" and ours is not None and theirs is not None:
            for part in fields(ours):
                if getattr(ours, part.name) != getattr(theirs, part.name):
                    named = ("moe_intermediate_size", "moe_ffn_hidden_size") if part.name == "ffn" else None
                    names = named or NAMES.get(part.name, (part.name, part.name))
                    yield names, getattr(ours, part.name), getattr(theirs, part.name)
        elif field.name not in FREE and ours != theirs and not _idle(field.name, a, b):
            yield NAMES.get(field.name, (field.name, field.name)), ours, theirs


def _idle(name: str, a: Architecture, b: Architecture) -> bool:
    """Whether neither model uses a field: the dense feed-forward size where every layer has experts."""
    return name == "ffn" and all(x.experts is not None and not x.experts.dense_layers for x in (a, b))
