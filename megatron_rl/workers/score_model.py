"""`ScoreModel`: a reward that is a model with a value head, run under this job's own layout.

    RewardModel("path/to/classifier")                   # `RewardModel` makes one of a path, a model or Megatron chunks
    rewards: [{name: model, options: {model: path/to/classifier}}]

The model is built on first use, in the layout of the job that runs then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rl.batch import Batch, Sample
from megatron_rl.batch.scores import ask_for_scores
from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.parallel import ParallelContext
from megatron_rl.rewards import REWARDS, Reward
from megatron_rl.workers.assembly import build_frozen, running_context
from megatron_rl.workers.heads import value_head
from megatron_rl.workers.megatron_model import is_hf_model
from megatron_rl.workers.scoring import ScoringModel, token_values
from megatron_rl.workers.settings import DtypeName, WorkerSettings


@dataclass(frozen=True, slots=True)
class ScoredText:
    """How the reward model sees a sample."""

    tokenizer: Any  # None: it has the policy's vocabulary, and sees the sample's own token ids
    pad_token_id: int | None  # trailing tokens of this id do not count

    def token_ids(self, sample: Sample) -> list[int]:
        """Prompt and response; re-tokenised, a response that stopped by itself ends with EOS again."""
        if self.tokenizer is None:
            return sample.prompt.token_ids + sample.response_ids
        ids = list(self.tokenizer.encode(sample.prompt.text + sample.response_text))
        stopped = sample.finish_reason == "stop" and self.tokenizer.eos_token_id is not None
        return [*ids, self.tokenizer.eos_token_id] if stopped and ids[-1:] != [self.tokenizer.eos_token_id] else ids


@REWARDS.register("model")
class ScoreModel(Reward):
    """The value of a sequence classifier with one label after the last token that is not padding.

    Collective over the ranks of a model replica, which must hold the same samples.
    """

    place = "model"

    class Config(ConfigRecord):
        """Options of the reward "model"."""

        model: str
        """Hugging Face folder or id of a sequence classifier with one label (`RewardTrainer` writes such)."""
        retokenize: bool = False
        """Re-encode the text with the reward model's own tokenizer; False: it shares the policy's vocabulary."""
        dtype: DtypeName = "float32"
        """Of the weights and of the forward pass."""
        token_budget: int = 4096
        """Tokens of one micro-batch, over all context-parallel ranks."""

    def __init__(
        self,
        config: Config | None = None,
        name: str = "model",
        *,
        model: Any = None,
        tokenizer: Any = None,
        vocab: int = 0,
        context: ParallelContext | None = None,
    ) -> None:
        """
        Args:
            config: options; ``model`` and ``tokenizer`` as objects go before those that it names.
            model: Hugging Face folder, id or model, or Megatron chunks with a `ValueHead`.
            tokenizer: re-encodes the text.
            vocab: logical vocabulary of Megatron chunks.
            context: the job's; None = the one that runs when the first samples are scored.

        Raises:
            ConfigError: no model was given.
        """
        if config is None and model is None:
            raise ConfigError("a reward model needs model: a Hugging Face folder, id or model, or Megatron chunks")
        self.name = name
        self.settings = WorkerSettings()
        if config is not None:
            self.settings = WorkerSettings(dtype=config.dtype, token_budget=config.token_budget)
        self.source = model if config is None else config.model
        self.tokenizer = load_tokenizer(config.model) if config and config.retokenize else tokenizer
        self.vocab = vocab or (len(tokenizer) if tokenizer is not None else 0)
        self.context = context
        self._worker: ScoringModel | None = None

    @property
    def worker(self) -> ScoringModel:
        """The model, built on first use; collective."""
        if self._worker is None:
            context = self.context or running_context(self.settings.seed)
            self._worker = build_frozen(self.source, context, self.settings, self.vocab, value_head=True)
        return self._worker

    def score(self, samples: Sequence[Sample]) -> Sequence[float]:
        worker = self.worker
        hf_config = worker.model.hf_config
        seen = ScoredText(self.tokenizer, hf_config.pad_token_id if hf_config is not None else None)
        rows = [seen.token_ids(sample) for sample in samples]
        batch = Batch.from_sequences(rows, [[0] * len(row) for row in rows])
        ask_for_scores(batch, seen.pad_token_id)
        values = token_values(worker, batch, value_head)
        return values[batch["response_mask"].bool()].to(torch.float32).tolist()


def is_model(source: Any) -> bool:
    """Whether a reward's source is a model rather than a function, a name or a service."""
    if isinstance(source, str):
        return Path(source).expanduser().is_dir() or (
            source.count("/") == 1 and ":" not in source and source not in REWARDS
        )
    chunks = list(source) if isinstance(source, list | tuple | torch.nn.ModuleList) else [source]
    return is_hf_model(source) or all(isinstance(chunk, torch.nn.Module) for chunk in chunks)
