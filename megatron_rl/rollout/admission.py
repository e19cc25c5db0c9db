"""Checks that all engines make before they do anything: of prompts, shards and sleep tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_rl.config import ConfigError
from megatron_rl.rollout.base import SamplingParams

TAGS = ("weights", "kv_cache")


def check_prompts(
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    params: SamplingParams,
    vocab: int,
    max_context: int,
    has_tokenizer: bool,
) -> None:
    """Raises ConfigError naming the prompt that is empty, too long, or has a token outside the vocabulary; or when
    seeds or the tokenizer for stop texts are missing."""
    if len(seeds) != len(prompts):
        raise ConfigError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one per prompt")
    if params.stop and not has_tokenizer:
        raise ConfigError(
            f"stop texts {list(params.stop)} need a tokenizer: give one to the engine, or use stop_token_ids"
        )
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ConfigError(f"prompt {index} is empty: give at least one token, for example the BOS token")
        if len(prompt) + params.max_tokens > max_context:
            raise ConfigError(
                f"prompt {index} has {len(prompt)} tokens, which with max_tokens={params.max_tokens} exceeds the "
                f"context of {max_context} tokens: shorten it, drop it, or lower max_tokens"
            )
        if min(prompt) < 0 or max(prompt) >= vocab:
            token = min(prompt) if min(prompt) < 0 else max(prompt)
            raise ConfigError(
                f"prompt {index} has token {token}, outside the vocabulary of {vocab}: "
                f"was it made with another model's tokenizer?"
            )


def check_shards(shards: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless ``shards`` are exactly those of ``shapes``."""
    if shards.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - shards.keys()), sorted(shards.keys() - shapes.keys())
        raise ValueError(
            f"a whole update is expected: shards missing: {missing or 'none'}; unknown: {unknown or 'none'}"
        )
    for name, shape in shapes.items():
        if tuple(shards[name].shape) != tuple(shape):
            raise ValueError(f"shard {name!r} has shape {tuple(shards[name].shape)}, expected {tuple(shape)}")


def check_tags(tags: Sequence[str]) -> None:
    """Raises ValueError for a tag that names no part of an engine's memory."""
    unknown = sorted(set(tags) - set(TAGS))
    if unknown:
        raise ValueError(f"unknown sleep tags {unknown}: known are {list(TAGS)}")
