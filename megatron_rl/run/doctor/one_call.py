"""Configurations for the doctor: those of `megatron-rl train`, and those of the one-call trainers.

The second kind is that of examples/dpo_pairs, kto_binary and reward_model: a section that names the trainer (``dpo``,
``kto``, ``reward`` or ``sft``) with fields of its algorithm and of its data, beside ``parallel``, ``worker`` and
``train``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from megatron_rl.config import ConfigError, ConfigRecord
from megatron_rl.config.files import load_config
from megatron_rl.data import PromptDataset
from megatron_rl.parallel import ParallelSizes
from megatron_rl.run.run_config import ReferenceConfig, RunConfig
from megatron_rl.run.trainers import DPOTrainer, KTOTrainer, OneCallTrainer, RewardTrainer, SFTTrainer
from megatron_rl.workers.actor_config import ActorConfig

SECTIONS: dict[str, type[OneCallTrainer]] = {
    "dpo": DPOTrainer,
    "kto": KTOTrainer,
    "reward": RewardTrainer,
    "sft": SFTTrainer,
}
WITHOUT_REFERENCE = ("reward", "sft")


class OneCallConfig(ConfigRecord):
    """The YAML of a trainer in one call; exactly one of the sections that name a trainer is given."""

    model: str = ""
    """Hugging Face folder or id: the doctor uses a small random model of the same family."""
    data: str = ""
    """Not used by the doctor."""
    parallel: ParallelSizes = ParallelSizes()
    """Not used: the doctor has its own layouts."""
    worker: ActorConfig = ActorConfig()
    """The worker."""
    dpo: dict[str, Any] | None = None
    """Fields of `DPO.Config` and of the pairs."""
    kto: dict[str, Any] | None = None
    """Fields of `KTO.Config` and of the labelled completions."""
    reward: dict[str, Any] | None = None
    """Fields of `RewardModelling.Config` and of the pairs."""
    sft: dict[str, Any] | None = None
    """Fields of `SFT.Config` and of the completions."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `train`."""


def load_examined(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a file of either kind describes.

    Raises:
        ConfigError: the file is broken, or a key is unknown.
    """
    if not names_trainer(path):
        return load_config(RunConfig, path, overrides)
    config = load_config(OneCallConfig, path, overrides)
    given = [name for name in SECTIONS if getattr(config, name) is not None]
    if len(given) != 1:
        raise ConfigError(f"{path} has the sections {' and '.join(given)}: one file describes one trainer")
    return as_run(config, given[0])


def names_trainer(path: Path) -> bool:
    """Whether the file is YAML and has one of the sections above."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # `load_config` says what is wrong with it
    return isinstance(values, dict) and any(name in values for name in SECTIONS)


def as_run(config: OneCallConfig, section: str) -> RunConfig:
    """The parts of a trainer's configuration that an update depends on, as a `RunConfig`."""
    trainer, options = SECTIONS[section], getattr(config, section)
    of_data = trainer.dataset_type.Config.model_fields
    algorithm = {name: value for name, value in options.items() if name not in of_data}
    if section == "reward":
        algorithm.setdefault("use_margins", bool(options.get("margin")))
    free = section in WITHOUT_REFERENCE or options.get("reference_free")
    return RunConfig(
        model=config.model or "a small random model",
        algorithm={"name": trainer.algorithm_type.name, **algorithm},
        actor=config.worker,
        reference=None if free else ReferenceConfig(),
        data=PromptDataset.Config(),
        rewards=(),
    )
