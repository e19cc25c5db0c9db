"""`ModelReward`: a reward computed by a model with a value head, in this job's own layout.

    RewardModel("path/to/classifier")            # a Hugging Face folder, or a Megatron checkpoint of any layout
    RewardModel(model=chunks, tokenizer=tokenizer, parallel_state=parallel_state)      # a Megatron job's own
    rewards: [{name: model, options: {model: path/to/classifier}}]

A model from a path is built on first use, in the layout of the job that runs then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from megatron_rl.batch import Batch, Sample
from megatron_rl.batch.value_tokens import append_value_tokens
from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.data.text import encode
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.engines.build import build_engine, needs_vocab
from megatron_rl.engines.engine_config import DtypeName, EngineConfig
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.rewards import REWARDS, Reward
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_rl.weights.starting_model import is_hf_model
from megatron_rl.workers.forward_only import forward_only
from megatron_rl.workers.job_context import job_context, role_context, running_context
from megatron_rl.workers.outputs import value_output


@dataclass(frozen=True, slots=True)
class RewardTokenizer:
    """The token ids of a sample as the reward model sees it."""

    tokenizer: Any  # None: it shares the policy's vocabulary and reads the sample's own token ids
    pad_token_id: int | None  # trailing tokens of this id are ignored

    def token_ids(self, sample: Sample) -> list[int]:
        """Prompt and response; re-tokenised, a response that stopped by itself ends with EOS again."""
        if self.tokenizer is None:
            return sample.prompt.token_ids + sample.response_ids
        ids = encode(sample.prompt.text + sample.response_text, self.tokenizer, special=True)
        stopped = sample.finish_reason == "stop" and self.tokenizer.eos_token_id is not None
        return [*ids, self.tokenizer.eos_token_id] if stopped and ids[-1:] != [self.tokenizer.eos_token_id] else ids


@REWARDS.register("model")
class ModelReward(Reward):
    """The value of a sequence classifier with one label after the last token that is not padding.

    Collective over the ranks of a model replica, which must hold the same samples.
    """

    place = "model"

    class Config(ConfigRecord):
        """Options of the reward "model"."""

        model: str
        """Hugging Face folder or id of a sequence classifier with one label (`RewardTrainer` writes such), or the
        Megatron checkpoint of a model with a value head."""
        model_config_path: str | None = None
        """Hugging Face folder or config.json that describes a Megatron checkpoint which does not carry its own."""
        retokenize: bool = False
        """Re-encode the text with the reward model's own tokenizer; False: it shares the policy's vocabulary."""
        dtype: DtypeName = "float32"
        """Of the weights and of the forward pass."""
        token_budget: int = Field(default=4096, ge=1)
        """Tokens of one micro-batch, over all context-parallel ranks."""

    def __init__(
        self,
        config: Config | None = None,
        name: str = "model",
        *,
        model: Any = None,
        tokenizer: Any = None,
        parallel_state: Any = None,
        parallel: ParallelSizes | None = None,
        context: ParallelContext | None = None,
        engine_config: EngineConfig | Mapping[str, Any] | None = None,
        retokenize: bool = False,
        pad_token_id: int | None = None,
    ) -> None:
        """
        Args:
            config: options; what they name goes before the objects below.
            model: as `Actor` takes it, with a value head.
            tokenizer: of the model: its length is the logical vocabulary of Megatron chunks; its padding is
                ignored.
            parallel_state, parallel, context: the job's; None of them: those of the job that runs when the first
                rewards are computed.
            engine_config: an `EngineConfig`, or its fields by name.
            retokenize: re-encode the text with ``tokenizer``; False: the model shares the policy's vocabulary.
            pad_token_id: trailing tokens of this id are ignored; None = as in the model's config, or the tokenizer's.

        Raises:
            ConfigError: no model was given, or Megatron chunks or ``retokenize`` without a tokenizer.
        """
        if config is None and model is None:
            raise ConfigError("a reward model needs model: a Hugging Face folder, id or model, or Megatron chunks")
        self.name = name
        self.source = model if config is None else _named(config)
        if config is not None:
            engine_config = {"dtype": config.dtype, "token_budget": config.token_budget}
            retokenize = config.retokenize
            tokenizer = load_tokenizer(_tokenizer_folder(self.source)) if retokenize else tokenizer
        if tokenizer is None and (retokenize or needs_vocab(self.source)):
            what = "that re-encodes texts" if retokenize else "of Megatron chunks"
            raise ConfigError(f"a reward model {what} needs its tokenizer: give tokenizer")
        self.engine_config = EngineConfig.of(engine_config, "RewardModel")
        self.tokenizer, self.retokenize = tokenizer, retokenize
        self._pad_token_id = pad_token_id
        self._context = context
        if parallel_state is not None or parallel is not None:
            self._context = job_context(parallel_state, parallel, self.engine_config.seed)
        self._engine: TrainingEngine | None = None

    @property
    def engine(self) -> TrainingEngine:
        """The model, built on first use; collective.

        Raises:
            ConfigError: it has no value head: its rewards would all be 0.
        """
        if self._engine is None:
            context = role_context(
                self.source, self._context or running_context(self.engine_config.seed), None, None, 0
            )
            vocab = 0 if self.tokenizer is None else len(self.tokenizer)
            engine = build_engine(
                self.source, context, self.engine_config, name="reward", vocab=vocab, value_model=True, frozen=True
            )
            if engine.origin.lacks_value_head:
                raise ConfigError(
                    f"reward {self.name!r}: {self.source} is a language model without a value head: expected a "
                    "sequence classifier with one label, as RewardTrainer writes it, or a critic"
                )
            self._engine = engine
        return self._engine

    @property
    def pad_token_id(self) -> int | None:
        """Trailing tokens of this id are ignored."""
        hf_config = self.engine.origin.hf_config
        if self._pad_token_id is not None or hf_config is None:
            return getattr(self.tokenizer, "pad_token_id", None) if self._pad_token_id is None else self._pad_token_id
        return hf_config.pad_token_id

    def score(self, samples: Sequence[Sample]) -> Sequence[float]:
        engine = self.engine
        tokens = RewardTokenizer(self.tokenizer if self.retokenize else None, self.pad_token_id)
        rows = [tokens.token_ids(sample) for sample in samples]
        batch = Batch.from_sequences(rows, [[0] * len(row) for row in rows])
        append_value_tokens(batch, tokens.pad_token_id)
        values = forward_only(engine, batch, value_output)
        return values[batch["response_mask"].bool()].to(torch.float32).tolist()


def _named(config: ModelReward.Config) -> str | MegatronCheckpoint:
    """The Megatron checkpoint that the configuration names, or else the Hugging Face folder or id as it is."""
    return MegatronCheckpoint.find(config.model, config.model_config_path) or config.model


def _tokenizer_folder(source: Any) -> str | Path:
    return source.tokenizer_folder if isinstance(source, MegatronCheckpoint) else source


def is_model(source: Any) -> bool:
    """Whether a reward's source is a model rather than a function, a name or a service."""
    if isinstance(source, str):
        return Path(source).expanduser().is_dir() or (
            source.count("/") == 1 and ":" not in source and source not in REWARDS
        )
    chunks = list(source) if isinstance(source, list | tuple | torch.nn.ModuleList) else [source]
    return (
        is_hf_model(source)
        or isinstance(source, TrainingEngine)
        or all(isinstance(chunk, torch.nn.Module) for chunk in chunks)
    )
