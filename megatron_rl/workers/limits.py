"""`model_limits`: vocabulary and context of a model before it is built, so that data are checked before training."""

from __future__ import annotations

from typing import Any

from megatron_rl.data import Limits
from megatron_rl.engines.build import needs_vocab, size_of
from megatron_rl.models.tokenizer import check_vocabulary
from megatron_rl.rollout import ENGINES
from megatron_rl.workers.actor_config import ActorConfig


def model_limits(model: Any, tokenizer: Any, config: ActorConfig, max_tokens: int | None = None) -> Limits:
    """Vocabulary and context length of ``model``.

    Args:
        model: as `Actor` takes it.
        max_tokens: of a response, where the data are prompts: the limit is then the rollout engine's context.

    Raises:
        ConfigError: ``model`` cannot be read, or lacks rows for ids of the tokenizer.
    """
    vocab, context = size_of(model, len(tokenizer))
    if not needs_vocab(model):
        check_vocabulary(tokenizer, vocab)
    if max_tokens is None:
        return Limits(vocab, context)
    engine = ENGINES[config.rollout.engine]
    return Limits(vocab, engine.context(config.rollout.options, context), max_tokens)
