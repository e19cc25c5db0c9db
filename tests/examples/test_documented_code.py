"""Every block of code in README.md and docs/ runs, or is what a running example says: none is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from conftest import ROOT
from forked import run_ranks
from small_run import digits, write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rl import GRPO, Actor, GRPOTrainer, PPOTrainer, RewardModel
from megatron_rl.collectives.simulator import ClusterConfig, simulate
from megatron_rl.config import load_user_object
from megatron_rl.models.family import ModelFamily
from megatron_rl.registry import Registry
from megatron_rl.rewards import REWARDS
from megatron_rl.rollout import ENGINES
from megatron_rl.run import RunConfig
from megatron_rl.tracking import TrackerGroup

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
# Run by tests of their own: as programs, as files of a run, under torchrun.
ELSEWHERE = {"README.md": {1}, "docs/adding_things.md": {0, 1, 3}}
PROGRAMS = ("docs/rollouts_in_flight.md", "docs/trainers.md")  # whose first block is one for torchrun
ELSEWHERE |= {page: {0} for page in PROGRAMS}
REQUIRED = {"model": "my-model", "data": {"path": "prompts.jsonl"}, "rewards": [{"name": "exact"}]}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def all_blocks(language: str) -> list[Any]:
    named = [
        (page.relative_to(ROOT).as_posix(), n, text) for page in PAGES for n, text in enumerate(blocks(page, language))
    ]
    return [pytest.param(page, n, text, id=f"{page}-{n}") for page, n, text in named]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the pages take for granted: a model, its tokenizer, data, and a folder that training left."""
    folder = tmp_path_factory.mktemp("documented")
    write_run(folder)
    (folder / "model").rename(folder / "my-model")
    pairs = [{"prompt": f"{a}+10=", "chosen": f"{a + 10}", "rejected": "11"} for a in range(10, 14)]
    for name in ("pairs", "held_out"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    asked = [{"prompt": f"{a}+10=", "answer": f"{a + 10}"} for a in range(10, 14)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (folder / "path/to/classifier").mkdir(parents=True)
    trainer = PPOTrainer(
        str(folder / "my-model"), AutoTokenizer.from_pretrained(folder / "my-model"), str(folder / "pairs.jsonl"),
        reward=digits, n=2, max_tokens=2, shared_critic=True,
    )  # fmt: skip
    quiet = TrackerGroup.Config(trackers=("jsonl",))
    trainer.train(1, 2, 1e-3, str(folder / "out"), max_steps=1, tracking=quiet)
    return folder


def job(folder: Path) -> dict[str, Any]:
    """The names that a Megatron job has."""
    from megatron.core import parallel_state

    tokenizer = AutoTokenizer.from_pretrained(folder / "my-model")
    own = Actor(str(folder / "my-model"), tokenizer)
    return {
        "model_chunks": own.engine.chunks,
        "optimizer": own.engine.optimizer,
        "tokenizer": tokenizer,
        "parallel_state": parallel_state,
        "Actor": Actor,
        "reward": RewardModel(digits),
        "grpo": GRPO(own),
        "RewardModel": RewardModel,
        "chunks": [torch.nn.Module()],
        "model": own.engine.chunks,
    }


def sharded_checkpoint(folder: Path) -> dict[str, Any]:
    """What a job under FSDP leaves by ``torch.distributed.checkpoint``."""
    model = AutoModelForCausalLM.from_pretrained(folder / "my-model")
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder / "fsdp-checkpoint", no_dist=True)
    return {}


def conversations(folder: Path) -> dict[str, Any]:
    """An actor whose tokenizer has a chat template, and a tool."""
    names = job(folder)
    names["tokenizer"].chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    calculate = load_user_object(f"{ROOT / 'examples/tool_use/calculator.py'}:calculate")
    return names | {"actor": Actor(str(folder / "my-model"), names["tokenizer"]), "calculate": calculate, "prompts": []}


def guesses(folder: Path) -> dict[str, Any]:
    """What the one-call trainers train, and the first block's environment."""
    found: dict[str, Any] = {}
    text = blocks(ROOT / "docs/episodes.md", "python")[0].split("flow = ")[0]
    (folder / "guess.py").write_text(text)
    exec(compile(text, "guess", "exec"), found)
    tokenizer, names = conversations(folder)["tokenizer"], {"GRPOTrainer": GRPOTrainer, "PPOTrainer": PPOTrainer}
    return names | {"model": "my-model", "tokenizer": tokenizer, "dataset": "prompts.jsonl", "polite": digits} | found


def families(folder: Path) -> dict[str, Any]:
    return {"FAMILIES": Registry("model family"), "ModelFamily": ModelFamily}


# Blocks that are no whole programs: what stands before them.
FRAGMENTS: dict[tuple[str, int], Callable[[Path], dict[str, Any]]] = {
    ("README.md", 0): job,
    ("docs/adding_things.md", 2): families,
    ("docs/episodes.md", 0): conversations,
    ("docs/episodes.md", 1): guesses,
    ("docs/episodes.md", 2): conversations,
    ("docs/megatron_lm.md", 0): job,
    ("docs/migration.md", 0): sharded_checkpoint,
    ("docs/rewards.md", 1): job,
}
# Blocks that walk through a file of the examples, which tests of their own run.
EXCERPTS = {"docs/own_algorithm.md": ROOT / "examples/custom_algorithm/best_of_group.py"}


@pytest.mark.parametrize(("page", "number", "text"), all_blocks("python"))
def test_python_runs(page, number, text, folder, monkeypatch):
    if page in EXCERPTS:
        written = {line.strip() for line in EXCERPTS[page].read_text().splitlines()}
        assert {line.strip() for line in text.splitlines()} <= written
        return
    program = compile(text, f"{page}-{number}", "exec")
    if number in ELSEWHERE.get(page, set()):
        return
    monkeypatch.chdir(folder)
    exec(program, {"__name__": "documented", **FRAGMENTS.get((page, number), lambda _: {})(folder)})


@pytest.mark.parametrize(("page", "number", "text"), all_blocks("yaml"))
def test_yaml_is_a_configuration(page, number, text):
    values = yaml.safe_load(text)
    if "ranks_per_node" in values:
        assert simulate(ClusterConfig.parse(values, where=f"{page}-{number}")).cases
        return
    run = RunConfig.parse(REQUIRED | values, where=f"{page}-{number}")
    for reward in run.rewards:
        if not reward.name.startswith("python:"):
            REWARDS[reward.name].Config.parse(reward.options, where=reward.name)
    assert run.actor.rollout.engine in ENGINES


def test_no_block_is_in_a_language_that_nothing_runs():
    languages = {name for page in PAGES for name in re.findall(r"^```(\w+)$", page.read_text(), re.MULTILINE)}
    assert languages <= {"python", "yaml"}


@pytest.mark.distributed
@pytest.mark.parametrize("page", PROGRAMS)
def test_the_first_block_is_a_program_for_torchrun(page, folder, tmp_path, monkeypatch):
    """As it is printed: without a guard around it."""
    for given in folder.iterdir():
        if given.name not in ("out", "outputs"):
            (tmp_path / given.name).symlink_to(given)
    (tmp_path / "train.py").write_text(blocks(ROOT / page, "python")[0])
    monkeypatch.chdir(tmp_path)
    run_ranks(tmp_path / "train.py", 2, timeout=200)
    (checkpoints,) = tmp_path.rglob("checkpoints")
    assert (checkpoints.parent / "hf" / "model.safetensors").is_file()
    assert list(checkpoints.glob("step_*"))
