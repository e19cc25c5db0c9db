"""DAPO refills its batch: uninformative groups are replaced by new prompts, the same on any number of ranks."""

from __future__ import annotations

import pytest
from forked import run_ranks
from small_run import PROGRAM, ROOT, environment, metrics_of, write_run

from megatron_rl.batch import Prompt, Sample
from megatron_rl.trainer.refill import own_share, renumbered, split_groups

REWARD = [{"name": f"python:{ROOT}/tests/run/small_run.py:many_even_digits"}]


def sample(group: int, reward: float) -> Sample:
    return Sample(Prompt([1], index=group), [2], [0.0], group=group, reward=reward)


def test_groups_without_a_kept_sample_are_told_from_the_others():
    samples = [sample(0, 1.0), sample(0, 0.0), sample(1, 1.0), sample(1, 1.0), sample(2, 0.0)]
    good, bad = split_groups(samples, [True, False, False, False, True])
    assert [[s.reward for s in group] for group in good] == [[1.0], [0.0]]
    assert [[s.group for s in group] for group in bad] == [[1, 1]]


def test_groups_are_shared_out_evenly_and_numbered_anew():
    groups = [[sample(7, 0.0)] * 2, [sample(3, 0.0)], [sample(9, 0.0)] * 2]
    assert [len(own_share(groups, rank, 2)) for rank in range(2)] == [1, 2]
    assert [s.group for s in renumbered(own_share(groups, 1, 2))] == [0, 1, 1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, dict[int, dict[str, float]]]:
    found = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"dapo{ranks}")
        trainer = {"output_dir": str(folder / "out"), "num_steps": 3, "export": False}
        algorithm = {"name": "dapo", "max_sampling_rounds": 6}
        config = write_run(folder, algorithm=algorithm, rewards=REWARD, trainer=trainer, reference=None)
        run_ranks(PROGRAM, ranks, str(config), PYTHONPATH=environment()["PYTHONPATH"])
        found[ranks] = metrics_of(folder / "out")
    return found


@pytest.mark.distributed
def test_batches_are_filled_with_groups_that_teach_something(runs):
    for metrics in runs[1].values():
        assert metrics["sampling/filled_fraction"] == 1.0
        assert metrics["advantages/std"] > 0.5
    rounds = [metrics["sampling/rounds"] for metrics in runs[1].values()]
    assert max(rounds) > 1
    assert sum(metrics["sampling/groups_dropped"] for metrics in runs[1].values()) > 0


@pytest.mark.distributed
def test_the_batch_does_not_depend_on_the_number_of_ranks(runs):
    for step, metrics in runs[1].items():
        for name in ("sampling/rounds", "sampling/groups_kept", "sampling/groups_dropped", "sampling/groups_unused"):
            assert runs[2][step][name] == metrics[name], (step, name)
        for name in ("rewards/mean", "loss/total", "optimizer/gradient_norm"):
            assert runs[2][step][name] == pytest.approx(metrics[name], rel=1e-3, abs=1e-6), (step, name)
