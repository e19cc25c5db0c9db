"""`model_limits`: what a model can take, known before it is built, so that data are checked before the first step."""

from __future__ import annotations

from typing import Any

from megatron_rl.data import Limits
from megatron_rl.engines.build import needs_vocab, size_of
from megatron_rl.models.tokenizer import check_vocabulary
from megatron_rl.rollout import ENGINES
from megatron_rl.workers.settings import WorkerSettings


def model_limits(model: Any, tokenizer: Any, settings: WorkerSettings, max_tokens: int | None = None) -> Limits:
    """Vocabulary and context of ``model``.

    Args:
        model: as `Actor` takes it.
        max_tokens: of an answer, where the data are prompts: the rollout engine's context counts then.

    Raises:
        ConfigError: ``model`` cannot be read, or lacks rows for ids of the tokenizer.
    """
    vocab, context = size_of(model, len(tokenizer))
    if not needs_vocab(model):
        check_vocabulary(tokenizer, vocab)
    if max_tokens is None:
        return Limits(vocab, context)
    engine = ENGINES[settings.rollout.engine]
    return Limits(vocab, engine.context(settings.rollout.options, context), max_tokens)
