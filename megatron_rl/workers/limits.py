"""`model_limits`: what a model can take, known before it is built, so that data are checked before the first step."""

from __future__ import annotations

from typing import Any

from megatron_rl.data import Limits
from megatron_rl.models.hf_config import architecture_from_hf
from megatron_rl.models.megatron_chunk import unwrap
from megatron_rl.models.tokenizer import check_vocabulary
from megatron_rl.rollout import ENGINES
from megatron_rl.workers.settings import WorkerSettings
from megatron_rl.workers.starting_weights import hf_config_of, is_hf_model, resolved


def model_limits(model: Any, tokenizer: Any, settings: WorkerSettings, max_tokens: int | None = None) -> Limits:
    """Vocabulary and context of ``model``.

    Args:
        model: as `Actor` takes it.
        max_tokens: of an answer, where the data are prompts: the rollout engine's context counts then.

    Raises:
        ConfigError: ``model`` cannot be read, or lacks rows for ids of the tokenizer.
    """
    if is_hf_model(model):
        architecture = architecture_from_hf(hf_config_of(resolved(model)))
        vocab, context = architecture.vocab, architecture.max_positions
        check_vocabulary(tokenizer, vocab)
    else:
        chunks = list(model) if hasattr(model, "__len__") else [model]
        vocab, context = len(tokenizer), int(unwrap(chunks[0]).max_sequence_length)  # type: ignore[arg-type]
    if max_tokens is None:
        return Limits(vocab, context)
    engine = ENGINES[settings.rollout.engine]
    return Limits(vocab, engine.context(settings.rollout.options, context), max_tokens)
