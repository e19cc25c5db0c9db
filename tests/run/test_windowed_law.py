"""The windowed law on real ranks: groups are trained on as they finish, each once and none too old."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from forked import run_ranks
from small_run import environment, metrics_of, write_run
from windowed_program import SLOW_S

from megatron_rl.config import ConfigError, load_config
from megatron_rl.run.check import check_run
from megatron_rl.run.run_config import RunConfig

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("windowed_program.py")
N, LAG, PROMPTS = 4, 1, 8
LAW = (f"rollout_lag={LAG}", "rollout_law=windowed", "actor.rollout.engine=uneven")


@pytest.mark.parametrize("rollout_ranks", [1, 2])
def test_every_group_is_trained_on_once_and_none_too_old(tmp_path: Path, rollout_ranks: int):
    config, paths = write_run(tmp_path), environment()["PYTHONPATH"]
    ranks = (f"parallel.rollout_ranks={rollout_ranks}", *LAW)
    noted = "callbacks=[small_run:Trained,small_run:StopAfterTwo]"
    run_ranks(PROGRAM, 1 + rollout_ranks, config, *ranks, noted, PYTHONPATH=paths)
    again = ("callbacks=[small_run:Trained]", "trainer.num_steps=4")
    run_ranks(PROGRAM, 1 + rollout_ranks, config, *ranks, *again, PYTHONPATH=paths)

    steps = list(map(json.loads, (tmp_path / "out" / "trained.jsonl").read_text().splitlines()))
    assert [found["step"] for found in steps] == [1, 2, 3, 4]
    counts = Counter(index for found in steps for index, _ in found["samples"])
    assert counts == dict.fromkeys(counts, N), "a group was trained on twice, or in part"
    assert len(counts) == 4 * PROMPTS  # of the 40 prompts of an epoch; the others were in flight at the end
    metrics = metrics_of(tmp_path / "out")
    for found in steps:
        served = found["step"] - 1
        assert all(served - LAG <= version <= served for _, version in found["samples"])
        at_once = metrics[found["step"]]
        assert at_once["rollout/staleness_max"] <= LAG
        shares = [at_once.get(f"rollout/staleness_{age}", 0.0) for age in range(LAG + 1)]
        assert sum(shares) == pytest.approx(1.0)
    ages = {found["step"] - 1 - version for found in steps for _, version in found["samples"]}
    assert ages == {0, 1}, "nothing was in flight over a step, or nothing came at once"


def test_slow_groups_hold_up_no_step(tmp_path: Path):
    """Under the batch law each of these steps would wait for one."""
    config, law = write_run(tmp_path, prompts_per_step=4), (*LAW, "rollout_lag=3")
    length = ("trainer.num_steps=4", "trainer.save_at_end=false")
    run_ranks(PROGRAM, 2, config, "parallel.rollout_ranks=1", *law, *length, PYTHONPATH=environment()["PYTHONPATH"])
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    name = "time/wait_for_groups_s"
    waited = [values[name] for values in map(json.loads, lines) if name in values]
    assert len(waited) == 4
    assert sum(seconds < SLOW_S / 2 for seconds in waited) >= 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout_law=windowed"], "rollout_lag"),
        (["rollout_law=windowed", "rollout_lag=1", "algorithm.name=dapo"], "rollout_law=batch"),
        (["rollout_law=sliding"], "rollout_law"),
    ],
)
def test_what_the_law_cannot_do_is_refused_before_a_run(tmp_path: Path, overrides: list[str], message: str):
    config = write_run(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_run(load_config(RunConfig, config, ["parallel.rollout_ranks=1", *overrides]), world_size=2)
    assert not (tmp_path / "out").exists()
