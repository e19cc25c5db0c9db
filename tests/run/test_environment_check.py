"""`train --check` of the section environment: names, options and the chat template, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_run import write_run

from megatron_rl.config import ConfigError, load_config
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.run import RunConfig
from megatron_rl.run.check import check_run

APPENDING = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
REWRITING = "{{ messages | length }}" + APPENDING
TOOL = "examples/tool_use/calculator.py"


def check(folder: Path, template: str | None, environment: dict[str, Any], **sections: Any) -> list[str]:
    root = Path(__file__).resolve().parents[2]
    environment = {**environment, "options": environment.get("options", {})}
    if "tools" in environment["options"]:
        environment["options"] = {"tools": [f"python:{root}/{name}" for name in environment["options"]["tools"]]}
    path = write_run(folder, environment=environment, **sections)
    if template is not None:
        tokenizer = load_tokenizer(folder / "model")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / "model")
    return check_run(load_config(RunConfig, path), world_size=1)


def test_an_environment_needs_no_rewards(tmp_path: Path) -> None:
    check(tmp_path, APPENDING, {"name": "tools", "options": {"tools": [f"{TOOL}:calculate"]}}, rewards=[])


@pytest.mark.parametrize(
    ("template", "environment", "said"),
    [
        (APPENDING, {"name": "tool"}, "Did you mean 'tools'"),
        (APPENDING, {"name": "tools", "options": {"tools": [f"{TOOL}:calculat"]}}, "has no 'calculat'"),
        (APPENDING, {"name": "tools", "options": {"tools": []}}, "at least one function"),
        (None, {"name": "tools", "options": {"tools": [f"{TOOL}:calculate"]}}, "chat template"),
        (REWRITING, {"name": "tools", "options": {"tools": [f"{TOOL}:calculate"]}}, "does not keep the beginning"),
    ],
    ids=["name", "function", "no tool", "no template", "rewriting template"],
)
def test_mistakes_are_found_before_a_run(
    tmp_path: Path, template: str | None, environment: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        check(tmp_path, template, environment)


def test_without_environment_and_rewards_there_is_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rewards is empty"):
        check_run(load_config(RunConfig, write_run(tmp_path, rewards=[])), world_size=1)
