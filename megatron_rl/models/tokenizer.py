"""Tokenizers: loading one, and aligning its pad and eos with the model's config when both are first seen together.

The tokenizer decides; the model's config follows, as in `transformers`' Trainer. A tokenizer without pad is an error
unless a choice is given (``pad_token="eos"`` or a token it knows) or the model's config names one: pad must never be
guessed, because batches, servers and exported folders would disagree about it in silence.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from megatron_rl.config import ConfigError
from megatron_rl.models.hf_config import GenerationFile, eos_ids

logger = logging.getLogger(__name__)

# Everything that transformers and SGLang read a tokenizer from, but code.
FILES = (
    "tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.tiktoken", "spiece.model", "sentencepiece*.model", "chat_template.*",
)  # fmt: skip
TEMPLATES = "additional_chat_templates"
Message = dict[str, str]  # {"role": "user", "content": "..."}


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids that tokenizer and model agree on."""

    pad: int
    eos: tuple[int, ...]  # any of them ends a response: the tokenizer's own, then the config's, then generation's


def load_tokenizer(source: str | Path, pad_token: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or model id, with its pad token set.

    Args:
        pad_token: see `align_tokenizer`; needed only where the tokenizer has no pad.

    Raises:
        ConfigError: there is no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        _check_types(tokenizer)
    except Exception as error:  # a damaged tokenizer.json raises whatever its parser meets
        raise ConfigError(
            f"no tokenizer could be loaded from {source} ({_brief(error)}): give a folder that has one"
        ) from None
    if pad_token is not None:
        _set_pad(tokenizer, pad_token)
    return tokenizer


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer, chat template included, byte for byte; not code, which is not exported."""
    for path in {found for pattern in FILES for found in source.glob(pattern) if found.is_file()}:
        shutil.copyfile(path, target / path.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, target / TEMPLATES)


def check_stored_vocabulary(folder: Path, vocab: int) -> None:
    """As `check_vocabulary`, for the tokenizer of a folder, read without making one.

    Raises:
        ConfigError: it has ids beyond ``vocab`` rows, or its file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer_config.json").is_file():
            check_vocabulary(load_tokenizer(folder), vocab)
        return
    try:
        fields = json.loads(path.read_bytes())
        words = fields["model"].get("vocab") or ()
        ids = list(words.values()) if isinstance(words, dict) else list(range(len(words)))
        ids += [token["id"] for token in fields.get("added_tokens") or ()]
        needed = 1 + max(ids, default=-1)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is not the file of a tokenizer ({error!r:.200}): restore the file") from None
    if needed > vocab:
        raise ConfigError(f"{path}: {_too_large(needed, vocab)}")


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab: int) -> None:
    """Refuse a tokenizer with ids that a model of ``vocab`` rows has no embedding for. Rows of padding, which Megatron
    and SGLang add, are none of these: nothing was trained in them, and no exported folder has them.

    Raises:
        ConfigError: it has such ids.
    """
    ids = (
        tokenizer.get_vocab().values() if isinstance(tokenizer, PreTrainedTokenizerBase) else ()
    )  # a tokenizer class of the user's own has none
    needed = max(len(tokenizer), 1 + max(ids, default=-1))
    if needed > vocab:
        raise ConfigError(_too_large(needed, vocab))


def _too_large(needed: int, vocab: int) -> str:
    return (
        f"the tokenizer has token ids up to {needed - 1}, but the model's vocabulary has {vocab} rows: take the "
        f"model's own tokenizer, or resize the model first (transformers: model.resize_token_embeddings({needed}), "
        "which gives new rows the mean of the old ones; model.save_pretrained(FOLDER)) and start from that folder"
    )


def _check_types(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise TypeError for fields of tokenizer_config.json that `transformers` takes as they come."""
    if isinstance(tokenizer.model_max_length, bool) or not isinstance(tokenizer.model_max_length, (int, float)):
        raise TypeError(f"model_max_length is {tokenizer.model_max_length!r}, expected a number")
    if not isinstance(tokenizer.chat_template, (str, dict, type(None))):
        raise TypeError(f"chat_template is a {type(tokenizer.chat_template).__name__}, expected a text")


def align_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig | None = None,
    pad_token: str | None = None,
    generation: GenerationFile | None = None,
) -> SpecialTokens:
    """Give tokenizer and config the same pad and eos, in place.

    Args:
        config: the model's; its pad, bos and eos ids are set to the tokenizer's. Further eos ids it names are kept.
        pad_token: what pads where the tokenizer does not say: "eos", or a token of its vocabulary.
        generation: the model's ``generation_config.json``; its eos ids end responses, too. The tokenizer's joins them.

    Raises:
        ConfigError: no pad or no eos can be found, or a special token is outside the model's vocabulary.
    """
    declared = eos_ids(config.eos_token_id) if config is not None else ()
    stops = (*declared, *(generation.stops if generation is not None else ()))
    if tokenizer.eos_token_id is None:
        if not stops:
            raise ConfigError(
                "neither the tokenizer nor the model's config names an eos token, so no response would ever end: "
                "set tokenizer.eos_token"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stops[0])
    if tokenizer.pad_token_id is None:
        _find_pad(tokenizer, config, pad_token)
    own = tokenizer.eos_token_id
    if config is not None:
        _align_config(tokenizer, config, SpecialTokens(tokenizer.pad_token_id, tuple(dict.fromkeys((own, *declared)))))
    if generation is not None:
        generation.add_stop(own)
    return SpecialTokens(tokenizer.pad_token_id, tuple(dict.fromkeys((own, *stops))))


def _find_pad(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig | None, pad_token: str | None) -> None:
    if pad_token is not None:
        _set_pad(tokenizer, pad_token)
    elif config is not None and config.pad_token_id is not None and 0 <= config.pad_token_id < len(tokenizer):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        logger.info("the tokenizer has no pad token; taking the model's, %r", tokenizer.pad_token)
    else:
        raise ConfigError(
            "the tokenizer has no pad token and the model's config names none: choose one with pad_token='eos' (or "
            "tokenizer.pad_token = tokenizer.eos_token), or with pad_token=<a token of its vocabulary>"
        )


def _set_pad(tokenizer: PreTrainedTokenizerBase, pad_token: str) -> None:
    token = tokenizer.eos_token if pad_token == "eos" else pad_token
    if token is None or token not in tokenizer.get_vocab():
        raise ConfigError(
            f"pad_token={pad_token!r} is not in the tokenizer's vocabulary: use 'eos' or a token it has, since a new "
            "token would need a new row in the embedding"
        )
    tokenizer.pad_token = token


def _align_config(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, special: SpecialTokens) -> None:
    vocab = config.vocab_size
    for name, token in (("pad", special.pad), *(("eos", token) for token in special.eos)):
        if not 0 <= token < vocab:
            raise ConfigError(
                f"{name} token id {token} is outside the model's vocabulary of {vocab}: this tokenizer belongs to "
                "another model"
            )
    changed = {"pad_token_id": special.pad, "eos_token_id": special.eos[0] if len(special.eos) == 1 else [*special.eos]}
    if tokenizer.bos_token_id is not None:
        changed["bos_token_id"] = tokenizer.bos_token_id
    for key, value in changed.items():
        if getattr(config, key) != value:
            logger.info("model config: %s %s -> %s, as in the tokenizer", key, getattr(config, key), value)
            setattr(config, key, value)


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
