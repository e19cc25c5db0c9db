"""`check_run`: all checks of a configuration that need no device and no process group, at once.

Each part is checked by the code that builds it in a run, so that the messages are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rl.config import ConfigError
from megatron_rl.data import DataError, PromptDataset
from megatron_rl.data.records import data_files
from megatron_rl.engines.build import check_sizes
from megatron_rl.environments import build_environment
from megatron_rl.models.hf_config import best_architecture, read_generation, read_hf_config
from megatron_rl.models.layouts import check_rollout
from megatron_rl.models.peft_adapters import PeftAdapters
from megatron_rl.models.tokenizer import align_tokenizer, load_tokenizer
from megatron_rl.rewards import RewardError, build_reward, check_answers
from megatron_rl.rollout import ENGINES
from megatron_rl.run.build import check_engine, find_algorithm, load_callback, starting_model
from megatron_rl.run.parts import check_layout, check_parts, rewards_of, smallest_world, unused_parts
from megatron_rl.run.run_config import RunConfig
from megatron_rl.tracking import build_tracker
from megatron_rl.trainer.output_lock import check_writable
from megatron_rl.trainer.restart_point import find_checkpoint
from megatron_rl.weights.hf_in import check_folder, resolve_folder
from megatron_rl.weights.megatron_checkpoint import MegatronCheckpoint
from megatron_rl.weights.source import SafetensorsFolder
from megatron_rl.workers.episodes import Episodes
from megatron_rl.workers.limits import model_limits

MISTAKES = (ConfigError, DataError, RewardError)
OTHER_RANK = 1  # on which trackers are checked, but not opened


class Attempts:
    """Runs checks and collects what they find."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __call__(self, check: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """The result of ``check``; None where it found a mistake."""
        try:
            return check(*arguments, **named)
        except MISTAKES as error:
            self.found.append(str(error))
            return None

    def report(self) -> None:
        """Raise ConfigError where anything was found."""
        found = list(dict.fromkeys(self.found))
        if len(found) == 1:
            raise ConfigError(found[0])
        if found:
            numbered = "; ".join(f"({number}) {message}" for number, message in enumerate(found, start=1))
            raise ConfigError(f"{len(found)} mistakes: {numbered}")


def check_run(config: RunConfig, world_size: int | None = None) -> list[str]:
    """Check names, files, columns and sizes.

    Args:
        world_size: ranks that the run will have; None = not known, so that only sizes of one replica are checked.

    Returns:
        Notes for the user, a line each.

    Raises:
        ConfigError: all mistakes, numbered if there are several.
    """
    attempt, output = Attempts(), Path(config.trainer.output_dir)
    algorithm = attempt(find_algorithm, config)
    if algorithm is not None:
        attempt(check_parts, config, *algorithm)
    attempt(check_engine, config)
    attempt(find_checkpoint, output / "checkpoints", config.trainer.resume)
    attempt(build_tracker, config.tracking, output, rank=OTHER_RANK)
    for name in config.callbacks:
        attempt(load_callback, name)
    attempt(check_writable, output)
    if world_size is not None:
        attempt(check_layout, config, world_size)
    _check_models(attempt, config)
    attempt.report()
    notes = unused_parts(config, *algorithm)
    if world_size is None:
        rollout_ranks = config.parallel.rollout_ranks
        more = f", and {rollout_ranks} more for parallel.rollout_ranks" if rollout_ranks else ""
        notes.append(
            f"the number of ranks is not known here, and was not checked: it must be a multiple of "
            f"{smallest_world(config.parallel)} ({config.parallel}){more}. Check it with WORLD_SIZE=N in front of this "
            "command, or under torchrun"
        )
    return notes


def _check_models(attempt: Attempts, config: RunConfig) -> None:
    """The models, the tokenizer, and with it prompts and rewards."""
    reward = attempt(build_reward, rewards_of(config))
    for other in (config.critic, config.reference):
        if other is not None and other.model is not None:
            attempt(lambda name: _check_sizes(resolve_folder(name), config), other.model)
    folder = attempt(_model_folder, config)
    sound = folder is not None and attempt(_check_sizes, folder, config)
    tokenizer = None
    if sound:
        attempt(_check_weights, folder, config)
        if config.actor.lora is not None and config.actor.lora.path is not None:
            attempt(PeftAdapters, config.actor.lora.path, best_architecture(read_hf_config(folder)))
    if sound or config.tokenizer is not None:
        tokenizer = attempt(load_tokenizer, config.tokenizer or folder, config.pad_token)
    if tokenizer is None:
        for section in _data_sections(config):
            attempt(_require_file, section.path)
        if config.environment is not None:
            attempt(build_environment, config.environment)
        return
    if config.environment is not None:
        attempt(Episodes, config.environment, tokenizer)
    limits = None
    if sound:
        attempt(_check_special_tokens, folder, tokenizer)
        limits = attempt(model_limits, folder, tokenizer, config.actor, config.actor.sampling.max_tokens)
    read = [attempt(PromptDataset, None, tokenizer, section, limits) for section in _data_sections(config)]
    if reward is not None and None not in read:
        attempt(check_answers, reward, [prompt for dataset in read for prompt in dataset])


def _data_sections(config: RunConfig) -> list[PromptDataset.Config]:
    return [config.data, *([config.evaluation.data] if config.evaluation else [])]


def _model_folder(config: RunConfig) -> Path:
    model = starting_model(config)
    return model.hf_folder if isinstance(model, MegatronCheckpoint) else resolve_folder(model)


def _check_sizes(folder: Path, config: RunConfig) -> bool:
    architecture = best_architecture(read_hf_config(folder))
    check_sizes(architecture, config.parallel, config.actor.backend)
    check_rollout(architecture, config.actor.rollout.tp, config.actor.rollout.ep)
    if config.actor.rollout.engine in ENGINES:  # else `check_engine` says so
        rollout = config.actor.rollout
        engine = ENGINES[rollout.engine].for_model(architecture)
        engine.check_model(architecture)
        engine.lay_out(architecture, rollout.tp, [tuple(range(rollout.tp))], rollout.ep)
    return True


def _check_weights(folder: Path, config: RunConfig) -> None:
    """The headers of the weight files; a Megatron checkpoint's weights are not in the folder of its description."""
    if not isinstance(starting_model(config), MegatronCheckpoint):
        with SafetensorsFolder(folder) as source:
            check_folder(source, best_architecture(read_hf_config(folder)))


def _check_special_tokens(folder: Path, tokenizer: Any) -> None:
    align_tokenizer(tokenizer, read_hf_config(folder), generation=read_generation(folder))


def _require_file(path: str) -> None:
    if not path:
        raise ConfigError("data.path is not given: name a file")
    data_files(path)
