"""Wrong arguments of the one-call trainers: one ConfigError that names the argument, before anything is loaded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from small_run import write_run
from transformers import AutoTokenizer

from megatron_rl import DPOTrainer, GRPOTrainer, KTOTrainer
from megatron_rl.algorithms.rollout_correction import RolloutCorrection
from megatron_rl.config import ConfigError
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.run.arguments import TrainArguments
from megatron_rl.trainer.trainer_config import TrainerConfig

PAIRS = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a)} for a in range(10, 18)]
SAME = {
    "num_train_epochs": (TrainerConfig, "num_epochs"),
    "learning_rate": (OptimizerConfig, "learning_rate"),
    "max_steps": (TrainerConfig, "num_steps"),
    "warmup_steps": (OptimizerConfig, "warmup_steps"),
    "evaluate_every": (TrainerConfig, "evaluate_every"),
    "save_every": (TrainerConfig, "save_every"),
    "save_at_end": (TrainerConfig, "save_at_end"),
}
WRONG: list[tuple[str, object]] = [
    ("learning_rate", -1),
    ("learning_rate", math.nan),
    ("learning_rate", "fast"),
    ("per_device_train_batch_size", 0),
    ("per_device_train_batch_size", -4),
    ("per_device_train_batch_size", 2.5),
    ("per_device_train_batch_size", True),
    ("num_train_epochs", math.nan),
    ("num_train_epochs", math.inf),
    ("num_train_epochs", 0),
    ("num_train_epochs", -1),
    ("output_dir", ""),
    ("output_dir", "  "),
    ("output_dir", None),
    ("output_dir", "a\0b"),
    ("output_dir", "/dev/null/out"),
    ("max_steps", -1),
    ("max_steps", 10**30),
    ("warmup_steps", -5),
    ("evaluate_every", -1),
    ("save_every", "x"),
    ("save_at_end", "x"),
    ("resume", ""),
    ("tracking", "jsonl"),
    ("tracking", {"trackers": 5}),
]
GIVEN: list[tuple[str, object]] = [
    ("beta", -0.1),
    ("beta", math.nan),
    ("max_length", 0),
    ("config", 5),
    ("config", {"dtype": "int8"}),
    ("config", {"dtyp": "float32"}),
    ("parallel", {"tp": 0}),
    ("parallel", 2),
    ("lora", {"rank": 0}),
    ("lora", 8),
    ("callbacks", [print]),
    ("callbacks", "file.py:Class"),
    ("tokenizer", "my-model"),
    ("tokenizer", None),
    ("model", None),
    ("model", ""),
    ("model", 5),
    ("model", "/nowhere/model"),
]
SAMPLED = [
    ("n", 0),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("temperature", -1.0),
    ("temperature", math.nan),
    ("reward", 5),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("arguments")
    write_run(folder)
    model = folder / "model"
    return {"model": str(model), "tokenizer": AutoTokenizer.from_pretrained(model), "dataset": PAIRS}


def assert_one_line(error: pytest.ExceptionInfo[ConfigError], name: str) -> None:
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}-{i}" for i, (name, _) in enumerate(WRONG)])
def test_train_names_the_argument(parts, name: str, value: object, tmp_path: Path) -> None:
    trainer = DPOTrainer(**parts, max_length=32)
    with pytest.raises(ConfigError) as error:
        trainer.train(**{"output_dir": str(tmp_path / "out"), name: value})
    assert_one_line(error, name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), GIVEN, ids=[f"{name}-{i}" for i, (name, _) in enumerate(GIVEN)])
def test_the_constructor_names_the_argument(parts, name: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        DPOTrainer(**parts | {name: value})
    assert_one_line(error, "/nowhere/model" if value == "/nowhere/model" else name)


@pytest.mark.parametrize(("name", "value"), SAMPLED, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SAMPLED)])
def test_sampling_is_checked_as_in_a_file(parts, name: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        GRPOTrainer(**parts | {"reward": lambda sample: 0.0, "max_tokens": 8, name: value})
    assert_one_line(error, name)


def test_a_batch_of_one_is_named_as_the_argument_it_was(parts) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PAIRS)]
    with pytest.raises(ConfigError, match="per_device_train_batch_size = 1"):
        KTOTrainer(parts["model"], parts["tokenizer"], rows).train(per_device_train_batch_size=1)


def test_the_ranges_are_those_of_the_file() -> None:
    for name, (record, field) in SAME.items():
        ours, theirs = TrainArguments.model_fields[name], record.model_fields[field]
        assert (ours.annotation, ours.metadata) == (theirs.annotation, theirs.metadata)


def test_mappings_stand_for_records_and_options_are_kept_as_plain_data(parts) -> None:
    correction = RolloutCorrection(level="token")
    given = {"config": {"token_budget": 99}, "parallel": {"tp": 2}, "correction": correction}
    trainer = GRPOTrainer(**parts, reward=len, max_tokens=8, **given)
    assert trainer.config.token_budget == 99
    assert trainer.parallel is not None
    assert trainer.parallel.tp == 2
    assert yaml.safe_load(yaml.safe_dump(trainer.plain_options()))["correction"]["level"] == "token"
