"""Runs with rollout ranks: with lag 0 the numbers of a run without them, with a lag exactly that much staleness."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import run_forked, run_ranks
from small_run import PROGRAM, ROOT, environment, metrics_of, write_run

from megatron_rl.config import ConfigError, load_config
from megatron_rl.run.check import check_run
from megatron_rl.run.run_config import RunConfig

pytestmark = pytest.mark.distributed

Metrics = dict[int, dict[str, float]]
PPO: dict[str, Any] = {"algorithm": {"name": "ppo"}, "critic": {}, "reference": None}
DAPO: dict[str, Any] = {
    "algorithm": {"name": "dapo", "max_sampling_rounds": 6},
    "rewards": [{"name": f"python:{ROOT}/tests/run/small_run.py:many_even_digits"}],
    "reference": None,
}
CASES = {"grpo": {}, "ppo": PPO, "dapo": DAPO}
OWN = ("rollout/staleness_", "weight_sync/wire_bytes")  # of runs with rollout ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Metrics]:
    """(case, ranks, overrides) -> metrics, each run once."""
    known: dict[tuple[object, ...], Metrics] = {}

    def metrics(case: str, ranks: int, *overrides: str) -> Metrics:
        key = (case, ranks, *overrides)
        if key not in known:
            folder = tmp_path_factory.mktemp(case)
            trainer = {"output_dir": str(folder / "out"), "num_steps": 4, "export": False, "evaluate_every": 2}
            held_out = {"data": {"path": str(folder / "train.jsonl")}, "n": 2, "temperature": 1.0}
            config = write_run(folder, **({"trainer": trainer, "evaluation": held_out} | CASES[case]))
            run_ranks(PROGRAM, ranks, config, *overrides, PYTHONPATH=environment()["PYTHONPATH"])
            known[key] = metrics_of(folder / "out")
        return known[key]

    return metrics


@pytest.mark.parametrize("case", CASES)
def test_without_lag_the_numbers_are_those_of_a_run_without_rollout_ranks(case: str, run: Callable[..., Metrics]):
    alone, beside = run(case, 1), run(case, 2, "parallel.rollout_ranks=1")
    assert beside.keys() == alone.keys() == {0, 1, 2, 3, 4}
    for step, expected in alone.items():
        found = {name: value for name, value in beside[step].items() if not name.startswith(OWN)}
        assert found == {name: value for name, value in expected.items() if not name.startswith(OWN)}, step
        assert beside[step].get("rollout/staleness_max", 0) == 0


def test_data_parallel_training_gets_its_shares(run: Callable[..., Metrics]):
    """The batch is the same; means over ranks of means are not, to the last bit, so only what training computes is."""
    alone, beside = run("ppo", 2), run("ppo", 4, "parallel.rollout_ranks=2", "actor.rollout.tp=2")
    for step in range(1, 5):
        for name in ("loss/total", "optimizer/gradient_norm", "policy/ratio_mean", "rewards/mean"):
            assert beside[step][name] == alone[step][name], (step, name)
        assert beside[step]["rollout/response_tokens_mean"] == pytest.approx(
            alone[step]["rollout/response_tokens_mean"], rel=1e-6
        )


@pytest.mark.parametrize("case", CASES)
def test_with_a_lag_staleness_is_exactly_that_and_the_run_reproducible(case: str, run: Callable[..., Metrics]):
    """On one rollout rank and on two, which share the prompts; GRPO's take two of them at a time."""
    lag = 2 if case == "ppo" else 1
    at_once = ["actor.rollout.max_running=8"] if case == "grpo" else []
    one = run(case, 2, "parallel.rollout_ranks=1", f"rollout_lag={lag}", *at_once)
    two = run(case, 3, "parallel.rollout_ranks=2", f"rollout_lag={lag}", *at_once)
    for step in range(1, 5):
        without = {name: value for name, value in two[step].items() if name != "weight_sync/wire_bytes"}
        assert without == {name: value for name, value in one[step].items() if name != "weight_sync/wire_bytes"}
        assert one[step]["rollout/staleness_max"] == one[step]["rollout/staleness_mean"] == min(step - 1, lag)
    colocated = run(case, 1, *at_once)
    assert {k: v for k, v in one[1].items() if k in colocated[1] and not k.startswith(OWN) and "eval/" not in k} == {
        k: v for k, v in colocated[1].items() if not k.startswith(OWN) and "eval/" not in k
    }
    assert one[3]["loss/total"] != colocated[3]["loss/total"]
    assert one[0] == colocated[0], "the evaluation at the start is of the same weights"


LAG = ("parallel.rollout_ranks=1", "rollout_lag=1")
TELL = """
import os, signal
from megatron_rl.trainer import Callback

class Tell(Callback):
    # Sends a signal to training rank 0. $TELL: steps done before, name of the signal.
    def on_step_begin(self, trainer, batch):
        step, name = os.environ.get("TELL", "-1 none").split()
        if trainer.step == int(step):
            os.kill(os.getpid(), getattr(signal, name))
"""
DIES = """
import os, signal

def reward(sample):
    if os.environ["RANK"] == "1" and sample.policy_version == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return sum(c in "02468" for c in sample.response_text) / 5
"""


def test_a_run_with_a_lag_that_is_stopped_and_killed_goes_on_to_the_bit(tmp_path: Path):
    """The batch in flight is in the checkpoint. Both halves end as one was told."""
    (tmp_path / "tell.py").write_text(TELL)
    (tmp_path / "whole").mkdir()
    run_ranks(PROGRAM, 2, write_run(tmp_path / "whole"), *LAG, PYTHONPATH=environment()["PYTHONPATH"])
    config = write_run(tmp_path, callbacks=[f"{tmp_path}/tell.py:Tell"])
    paths = environment()["PYTHONPATH"]
    stopped = run_forked(PROGRAM, config, *LAG, nproc=2, PYTHONPATH=paths, TELL="3 SIGTERM")
    assert stopped.code == 143
    assert "stopped by signal 15 after step 4" in stopped.err
    killed = run_forked(PROGRAM, config, *LAG, nproc=2, PYTHONPATH=paths, TELL="5 SIGKILL")
    assert killed.code == -9
    run_ranks(PROGRAM, 2, config, *LAG, PYTHONPATH=paths)
    assert metrics_of(tmp_path / "out") == metrics_of(tmp_path / "whole" / "out")


def test_a_checkpoint_with_batches_in_flight_is_resumed_on_other_ranks_and_without_a_lag(tmp_path: Path):
    """Two data-parallel ranks get their shares of what one had; without rollout ranks it is sampled anew."""
    paths, two, none = environment()["PYTHONPATH"], tmp_path / "two", tmp_path / "none"
    config = write_run(tmp_path)
    run_ranks(PROGRAM, 2, config, *LAG, "callbacks=[small_run:StopAfterTwo]", PYTHONPATH=paths)
    shutil.copytree(tmp_path / "out", two)
    shutil.copytree(tmp_path / "out", none)
    run_ranks(PROGRAM, 2, config, *LAG, "trainer.num_steps=3", PYTHONPATH=paths)
    run_ranks(PROGRAM, 3, config, *LAG, "trainer.num_steps=3", f"trainer.output_dir={two}", PYTHONPATH=paths)
    one = metrics_of(tmp_path / "out")[3]
    for name in ("loss/total", "optimizer/gradient_norm", "rewards/mean", "mismatch/stale_fraction"):
        assert metrics_of(two)[3][name] == pytest.approx(one[name], rel=1e-5), name
    run_ranks(PROGRAM, 1, config, "trainer.num_steps=3", f"trainer.output_dir={none}", PYTHONPATH=paths)
    assert metrics_of(none)[3]["mismatch/stale_fraction"] == 0.0
    assert one["mismatch/stale_fraction"] == 1.0


def test_a_rollout_rank_that_dies_is_noticed(tmp_path: Path):
    (tmp_path / "dies.py").write_text(DIES)
    config = write_run(tmp_path, rewards=[{"name": f"python:{tmp_path}/dies.py:reward"}])
    ended = run_forked(PROGRAM, config, *LAG, nproc=2, PYTHONPATH=environment()["PYTHONPATH"], timeout=200)
    assert ended.code == -9
    assert "[rank 0] TransportError: rank 1 has ended" in ended.err, ended.err[-3000:]
    assert not ended.late


def test_from_python_every_rank_makes_the_same_trainer(tmp_path: Path):
    write_run(tmp_path)
    paths = environment()["PYTHONPATH"]
    output = run_ranks(Path(__file__).with_name("rollout_ranks_program.py"), 2, tmp_path, PYTHONPATH=paths)
    assert "lag 1: rollout ranks run actor.sample >> reward.score of step k+1" in output
    assert "local engine TP1 on 1 rollout ranks" in output
    one, two = (line for line in output.splitlines() if line.startswith("returned: "))
    assert one == two
    assert metrics_of(tmp_path / "python")[3]["rollout/staleness_max"] == 1.0


def mistakes(folder: Path, world_size: int, *overrides: str) -> str:
    config = load_config(RunConfig, write_run(folder), list(overrides))
    with pytest.raises(ConfigError) as error:
        check_run(config, world_size)
    return str(error.value)


def test_what_cannot_be_is_refused_before_the_run(tmp_path: Path):
    assert "rollout_lag=1 needs ranks that sample" in mistakes(tmp_path, 2, "rollout_lag=1")
    assert "leaves none for training" in mistakes(tmp_path, 2, "parallel.rollout_ranks=2")
    assert "does not divide parallel.rollout_ranks=1" in mistakes(
        tmp_path, 2, "parallel.rollout_ranks=1", "actor.rollout.tp=2"
    )
    refused = mistakes(tmp_path, 4, "parallel.rollout_ranks=1", "parallel.tp=2")
    assert "parallel.rollout_ranks=1 leaves 3 of the 4 that torchrun started for training" in refused
    assert "start a multiple of 2 and 1 more" in refused


def test_a_failing_reward_ends_both_halves_with_its_own_words(tmp_path: Path):
    config = write_run(tmp_path, rewards=[{"name": f"python:{ROOT}/tests/cli/failing_rewards.py:raising"}])
    ended = run_forked(PROGRAM, config, "parallel.rollout_ranks=1", nproc=2, PYTHONPATH=environment()["PYTHONPATH"])
    assert ended.code == 2, ended.err[-3000:]
    assert "[rank 1] RewardError" in ended.err
    assert "[rank 0] PeerError: on the rollout ranks, RewardError" in ended.err
