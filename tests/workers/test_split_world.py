"""Training ranks and rollout ranks of one job: two worlds, and a bridge that pushes cross."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks
from small_run import write_run


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("split")
    write_run(folder)
    return run_ranks(Path(__file__).with_name("split_world_program.py"), 6, folder / "model", timeout=280)


@pytest.mark.distributed
@pytest.mark.parametrize("half", ["training", "rollout"])
@pytest.mark.parametrize(
    "what",
    [
        "each half is a world of its own",
        "a push at the minimum of bytes, TP1",
        "a push at the minimum of bytes, TP2",
        "refusal",
    ],
)
def test_rollout_ranks_beside_training_ranks(output: str, what: str, half: str) -> None:
    assert output.splitlines().count(f"held: {what} ({half})") == 1


@pytest.mark.distributed
def test_two_replicas_and_one_of_two_ranks_sample_the_same(output: str) -> None:
    """Both serve the same weights, and seeds belong to prompts."""
    one, two = (line.split(maxsplit=2)[2] for line in output.splitlines() if line.startswith("sampled: "))
    assert one == two
