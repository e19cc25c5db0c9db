"""`check_run`: everything about a configuration that can be known without a device or a process group, all at once.

Each part is checked by the code that builds it in a run, so that nothing is said twice or differently.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.data import DataError, PromptDataset
from megatron_rl.data.records import data_files
from megatron_rl.models.builder import transformer_config
from megatron_rl.models.hf_config import architecture_from_hf, read_hf_config
from megatron_rl.models.tokenizer import check_vocabulary, load_tokenizer
from megatron_rl.rewards import RewardError, build_reward
from megatron_rl.rollout import ENGINES
from megatron_rl.run.build import check_engine, find_algorithm, load_callback, starting_model
from megatron_rl.run.config import RunConfig
from megatron_rl.tracking import build_tracker
from megatron_rl.trainer.restart_point import find_checkpoint
from megatron_rl.weights.hf_in import resolve_folder
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint

MISTAKES = (ConfigError, DataError, RewardError)
OTHER_RANK = 1  # on which trackers are checked, but not opened


def check_run(config: RunConfig) -> None:
    """Check names, files, columns and sizes.

    Raises:
        ConfigError: everything that is wrong, numbered where it is more than one thing.
    """
    found: list[str] = []

    def attempt(check: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return check(*arguments, **named)
        except MISTAKES as error:
            found.append(str(error))
            return None

    output = Path(config.trainer.output_dir)
    attempt(find_algorithm, config)
    attempt(check_engine, config)
    attempt(find_checkpoint, output / "checkpoints", config.trainer.resume)
    attempt(build_reward, config.rewards)
    attempt(build_tracker, config.tracking, output, rank=OTHER_RANK)
    for name in config.callbacks:
        attempt(load_callback, name)
    attempt(check_writable, output)
    folder = attempt(_model_folder, config)
    if folder is not None:
        attempt(_check_model, folder, config)
    tokenizer = None
    if folder is not None or config.tokenizer is not None:
        tokenizer = attempt(load_tokenizer, config.tokenizer or folder, config.pad_token)
    if folder is not None and tokenizer is not None:
        attempt(_check_vocabulary, folder, tokenizer)
    for section in (config.data, config.evaluation.data if config.evaluation else None):
        if section is not None and tokenizer is not None:
            attempt(PromptDataset, None, tokenizer, section)
        elif section is not None:
            attempt(_require_file, section.path)
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        numbered = "; ".join(f"({number}) {message}" for number, message in enumerate(dict.fromkeys(found), start=1))
        raise ConfigError(f"{len(dict.fromkeys(found))} mistakes: {numbered}")


def check_writable(folder: Path) -> None:
    """Raise ConfigError unless files can be made in ``folder``, or it in the nearest folder above that exists."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "is no folder" if not place.is_dir() else "cannot be written to"
        raise ConfigError(f"trainer.output_dir={str(folder)!r}: {place} {what}: choose another")


def _model_folder(config: RunConfig) -> Path:
    model = starting_model(config)
    return model.hf_folder if isinstance(model, MegatronCheckpoint) else resolve_folder(model)


def _check_model(folder: Path, config: RunConfig) -> None:
    architecture = architecture_from_hf(read_hf_config(folder))
    transformer_config(architecture, config.parallel)
    if config.actor.rollout.engine in ENGINES:  # else `check_engine` says so
        ENGINES[config.actor.rollout.engine].check_model(architecture)


def _check_vocabulary(folder: Path, tokenizer: Any) -> None:
    check_vocabulary(tokenizer, architecture_from_hf(read_hf_config(folder)).vocab)


def _require_file(path: str) -> None:
    if not path:
        raise ConfigError("data.path is not given: name a file")
    data_files(path)
