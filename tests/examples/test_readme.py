"""The README's program runs as it is printed, and its local links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from forked import run_alone, run_ranks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]


@pytest.fixture
def eight_lines(seeded_model, tmp_path) -> str:
    """The program, for two steps, and what it reads."""
    section = (ROOT / "README.md").read_text().split("## Eight lines")[1]
    (tmp_path / "my-model").symlink_to(seeded_model)
    row = '{"prompt": "Once upon a time, there was a girl named Lily.", "answer": "girl"}\n'
    (tmp_path / "prompts.jsonl").write_text(row * 32)
    return section.split("```python\n")[1].split("```")[0].replace("range(100)", "range(2)")


def test_the_eight_lines_run_as_they_are_printed(eight_lines, tmp_path):
    (tmp_path / "eight_lines.py").write_text(eight_lines)
    out = run_alone(tmp_path / "eight_lines.py", directory=tmp_path, timeout=300)
    rewards = [float(line) for line in out.splitlines()]
    assert len(rewards) == 2
    assert all(0 < reward < 1 for reward in rewards)
    assert (tmp_path / "my-better-model" / "model.safetensors").is_file()


@pytest.mark.distributed
def test_on_two_ranks_the_eight_lines_train_on_different_prompts(eight_lines, tmp_path):
    assert "prompts.next_batch()" in eight_lines
    program = tmp_path / "eight_lines.py"
    watched = eight_lines.replace("prompts.next_batch()", "seen(prompts.next_batch())")
    program.write_text(
        f"import os; os.chdir({str(tmp_path)!r})\n"
        "def seen(batch):\n"
        "    print('SEEN', [prompt.index for prompt in batch.prompts], flush=True)\n"
        "    return batch\n" + watched
    )
    out = run_ranks(program, 2, timeout=300)
    seen = [json.loads(line.removeprefix("SEEN ")) for line in out.splitlines() if line.startswith("SEEN ")]
    assert sorted(index for indices in seen for index in indices) == list(range(32))  # 2 ranks, 2 steps of 8 each


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_local_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files_exist(page: Path):
    named = re.findall(r"`(\w+(?:/\w+)+\.py)`", page.read_text())
    roots = (ROOT, ROOT / "megatron_rl", page.parent)
    assert [name for name in named if not any((root / name).is_file() for root in roots)] == []


JOURNEYS = ("### A weight's journey", "### A prompt's journey", "From an algorithm to its gradient")


@pytest.mark.parametrize("journey", JOURNEYS)
def test_a_journey_has_at_most_eight_hops_and_each_begins_with_a_file(journey: str):
    text = (ROOT / "README.md").read_text().split(journey)[1]
    hops = []
    for line in text[text.index("1. ") :].splitlines():
        if line and not re.match(r"\d+\. |   ", line):
            break
        if hop := re.match(r"\d+\. (.*)", line):
            hops.append(hop[1])
    assert 3 <= len(hops) <= 8
    for hop in hops:
        (file,) = re.findall(r"^`([\w/]+\.py)`", hop)
        assert (ROOT / "megatron_rl" / file).is_file()
