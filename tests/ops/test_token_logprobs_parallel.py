"""`token_logprobs` with the vocabulary split over two real ranks (see token_logprobs_program.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks

from megatron_rl.ops.selection import UnavailableError, implementations, load

PROGRAM = Path(__file__).with_name("token_logprobs_program.py")


def available() -> list[str]:
    names = []
    for name in implementations("token_logprobs"):
        try:
            load("token_logprobs", name, "cpu")
        except UnavailableError:
            continue
        names.append(name)
    return names


@pytest.mark.distributed
def test_a_vocabulary_split_over_ranks_changes_nothing():
    names = available()
    output = run_ranks(PROGRAM, 2, *names, timeout=180)
    errors = {line: float(line.rsplit("|", 1)[1]) for line in output.splitlines() if line.startswith("case|")}
    assert len(errors) == 5 * len(names)
    assert all(error < 2e-5 for error in errors.values()), "\n".join(errors)
