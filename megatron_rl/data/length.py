"""Fitting a prompt and its completions into a length: skip, stop, or cut, as configured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_rl.data.dataset import SkipRowError, TokenisedDataset
from megatron_rl.data.records import DataError


class LengthConfig(TokenisedDataset.Config):
    """Length limits of data with completions."""

    max_length: int = Field(default=1024, ge=1)
    """Longest prompt and completion together, in tokens."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, in tokens; longer ones count as too long whatever their completions are."""
    overlong: Literal["skip", "truncate_prompt", "truncate_completion", "error"] = "skip"
    """Rows that are too long, for `max_length` or the model's context: leave them out (counted), drop the beginning of
    the prompt, drop the end of the completion, or stop."""


def fit(
    prompt: list[int],
    completions: list[list[int]],
    config: LengthConfig,
    place: str,
    context: int | None = None,
) -> tuple[list[int], list[list[int]]]:
    """``prompt`` and ``completions`` within the limits; all completions keep the same prompt.

    Truncating the prompt keeps its end and at least one token; what is then still too long loses the end of its
    completion. Truncating the completion leaves the prompt whole.

    Args:
        context: of the model, in tokens; it counts where it is shorter than ``max_length``.

    Raises:
        SkipRowError: the row is to be left out, or cutting would leave a completion without tokens.
        DataError: with ``overlong: error``; ``place`` names the row.
    """
    longest = max(map(len, completions))
    max_length = config.max_length if context is None else min(context, config.max_length)
    beyond_context = max_length < config.max_length and len(prompt) + longest > max_length
    prompt_limit = config.max_prompt_tokens or max_length
    if len(prompt) <= prompt_limit and len(prompt) + longest <= max_length:
        return prompt, completions
    if config.overlong == "error":
        raise DataError(
            f"{place}: prompt of {len(prompt)} and completion of {longest} tokens exceed "
            + (f"the model's context of {context}" if beyond_context else f"max_length={max_length}")
            + (f" or max_prompt_tokens={config.max_prompt_tokens}" if config.max_prompt_tokens else "")
            + ": raise the limit, or set overlong to skip, truncate_prompt or truncate_completion"
        )
    if config.overlong == "skip":
        raise SkipRowError(f"longer than the model's context of {context} tokens" if beyond_context else "too long")
    if config.overlong == "truncate_prompt":
        keep = max(1, min(prompt_limit, max_length - longest, len(prompt)))
        prompt = prompt[-keep:]
    room = max_length - len(prompt)
    if len(prompt) > prompt_limit or room < 1:
        raise SkipRowError("prompt too long")
    return prompt, [completion[:room] for completion in completions]
