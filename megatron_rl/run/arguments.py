"""The arguments of the one-call trainers and of their `train(...)`, checked as in a YAML file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.config.ranges import NonNegative
from megatron_rl.registry import nearest
from megatron_rl.trainer.callbacks import Callback
from megatron_rl.trainer.trainer_config import TrainerConfig

Record = TypeVar("Record", bound=ConfigRecord)


class TrainArguments(ConfigRecord):
    """Arguments of `OneCallTrainer.train`."""

    num_train_epochs: float = Field(gt=0, le=1e9)
    """Passes over the data."""
    per_device_train_batch_size: int = Field(ge=1)
    """Records a step on each data-parallel replica."""
    learning_rate: NonNegative
    """Peak learning rate."""
    output_dir: str
    """Folder for everything that is written."""
    max_steps: int | None = Field(default=None, ge=0)
    """Steps of the run, in place of num_train_epochs."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    evaluate_every: int = Field(default=0, ge=0)
    """Steps between evaluations."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints."""
    save_at_end: bool = True
    """A checkpoint after the last step."""
    resume: str = "auto"
    """As in `TrainerConfig`."""

    @classmethod
    def of(cls, trainer: str, values: Mapping[str, Any]) -> TrainArguments:
        """The arguments of a call of ``trainer``.

        Raises:
            ConfigError: one is of the wrong type or out of its range; the message names it.
        """
        paths = {name: os.fspath(value) if isinstance(value, Path) else value for name, value in values.items()}
        return cls.parse(paths, where=f"{trainer}.train")

    @property
    def trainer_config(self) -> TrainerConfig:
        """These arguments as the config of the loop."""
        return TrainerConfig(
            output_dir=self.output_dir,
            num_steps=self.max_steps,
            num_epochs=self.num_train_epochs,
            evaluate_every=self.evaluate_every,
            save_every=self.save_every,
            save_at_end=self.save_at_end,
            resume=self.resume,
        )


def record_of(kind: type[Record], given: Any, where: str) -> Record | None:
    """``given`` as a config record: as it is, or made of its fields.

    Raises:
        ConfigError: it is something else, or its fields are wrong.
    """
    if given is None or isinstance(given, kind):
        return given
    if isinstance(given, Mapping):
        return kind.parse(given, where=where)
    raise ConfigError(f"{where} is a {type(given).__name__}, expected a {kind.__qualname__} or a mapping of its fields")


def split_options(
    trainer: str, options: Mapping[str, Any], algorithm: type[ConfigRecord], dataset: type[ConfigRecord]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a one-call trainer by owner: (fields of the algorithm's Config, fields of the data set's Config).

    Raises:
        ConfigError: one that neither Config has, a bad value of the algorithm's, or ``precomputed_reference``: only
            batches of a custom flow can hold log-probabilities, those of a data set never do.
    """
    known = sorted({*algorithm.model_fields, *dataset.model_fields})
    for name in options:
        if name not in known:
            raise ConfigError(f"{trainer}: unknown option {name!r}.{nearest(name, known)} Known: {', '.join(known)}")
    of_data = {name: value for name, value in options.items() if name in dataset.model_fields}
    of_algorithm = {name: value for name, value in options.items() if name not in dataset.model_fields}
    algorithm.parse(of_algorithm, where=trainer)
    if of_algorithm.get("precomputed_reference"):
        raise ConfigError(
            f"{trainer}: precomputed_reference is for batches that hold ref_logprobs, and a data set has none. Give "
            "reference_cache=FOLDER instead: they are computed once and kept there"
        )
    return of_algorithm, of_data


def check_callbacks(callbacks: Any, where: str) -> Sequence[Callback]:
    """Raises ConfigError unless these are `Callback` objects."""
    found = list(callbacks) if isinstance(callbacks, Sequence) and not isinstance(callbacks, str) else [callbacks]
    for callback in found:
        if not isinstance(callback, Callback):
            raise ConfigError(f"{where}: {callback!r:.100} is not a Callback object: give a list of them")
    return found


def check_model_and_tokenizer(model: Any, tokenizer: Any, trainer: str) -> None:
    """Raises ConfigError for what cannot be either; the model itself is checked when it is read."""
    if isinstance(model, (str, Path)) and not str(model).strip():
        raise ConfigError(f"{trainer}: model is an empty text: give a Hugging Face folder or id")
    if model is None or isinstance(model, (bool, int, float, bytes, dict, set)):
        raise ConfigError(
            f"{trainer}: model is {model!r:.100}, expected a Hugging Face folder, id or model, or Megatron chunks"
        )
    if not hasattr(tokenizer, "encode") or isinstance(tokenizer, (str, bytes)):
        raise ConfigError(
            f"{trainer}: tokenizer is {tokenizer!r:.100}, expected a tokenizer object: "
            "AutoTokenizer.from_pretrained(...) loads one"
        )
