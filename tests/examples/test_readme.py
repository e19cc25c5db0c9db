"""The README's program runs as it is printed, and its local links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]


def test_the_eight_lines_run_as_they_are_printed(stories_model, tmp_path):
    section = (ROOT / "README.md").read_text().split("## Eight lines")[1]
    program = section.split("```python\n")[1].split("```")[0].replace("range(100)", "range(2)")
    (tmp_path / "my-model").symlink_to(stories_model)
    row = '{"prompt": "Once upon a time, there was a girl named Lily.", "answer": "Lily"}\n'
    (tmp_path / "prompts.jsonl").write_text(row * 16)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rewards = [float(line) for line in done.stdout.splitlines()]
    assert len(rewards) == 2
    assert all(0 < reward < 1 for reward in rewards)
    assert (tmp_path / "my-better-model" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_local_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []
