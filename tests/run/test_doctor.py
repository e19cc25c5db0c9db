"""`megatron-rl doctor` on the configuration that is shipped, and on four planted faults, over ranks that are forks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from forked import run_forked
from small_run import ROOT

from megatron_rl.cli import doctor as cli
from megatron_rl.cli.app import main
from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Experts
from megatron_rl.run.build import find_algorithm
from megatron_rl.run.doctor.compare import Measured, differences
from megatron_rl.run.doctor.examine import Report, examine, torchrun
from megatron_rl.run.doctor.one_call import load_examined
from megatron_rl.run.doctor.random_data import PLAIN, write_random_model
from megatron_rl.run.doctor.variants import variants_for

CONFIG = ROOT / "examples" / "arithmetic_grpo" / "config.yaml"
FAULTS = Path(__file__).with_name("faulty_algorithms.py")


def forks(arguments: Sequence[str], ranks: int, log: Path, timeout: float) -> int | None:
    """Starts the doctor's ranks in no time."""
    ended = run_forked(*arguments, nproc=ranks, timeout=timeout)
    log.write_text(ended.out + ended.err)
    return None if ended.late else ended.code


def doctor(*overrides: str, config: Path = CONFIG, algorithm: str | None = None, ranks: int = 2) -> Report:
    return examine(load_examined(config, list(overrides)), algorithm, max_ranks=ranks, timeout=300, launch=forks)


def marks(report: object, layout: str) -> list[str]:
    """What the table says of one layout: fields, loss, gradient, metrics."""
    (row,) = [line for line in str(report).splitlines() if line.startswith(f"{layout}  ")]
    return row.split()[-4:]


@pytest.fixture(scope="module")
def shipped() -> Report:
    return doctor(ranks=4)


@pytest.mark.distributed
def test_the_shipped_grpo_is_healthy_on_every_layout(shipped):
    assert shipped.healthy, str(shipped)
    assert "healthy" in str(shipped)
    for layout in ("small micro-batches", "padded rows", "DP2", "CP2", "TP2", "PP2", "PP2 VPP2", "TP2 PP2"):
        assert marks(shipped, layout) == ["same"] * 4


@pytest.mark.distributed
def test_the_command_prints_a_healthy_report_and_ends_well(shipped, monkeypatch, capsys):
    monkeypatch.setattr("megatron_rl.run.doctor.examine.examine", lambda *_, **options: shipped)
    assert cli.doctor(CONFIG, ranks=4) is None
    assert capsys.readouterr().out == f"{shipped}\n"


@pytest.mark.distributed
def test_ppo_with_a_critic_on_shared_weights_is_healthy_on_every_layout():
    report = doctor("algorithm={name: ppo, shared_critic: true, num_mini_batches: 2}", "actor.value_head=true")
    assert report.healthy, str(report)


@pytest.mark.distributed
def test_a_mixture_of_experts_is_also_examined_with_its_experts_spread_over_ranks(tmp_path):
    experts = replace(PLAIN, family="qwen3_moe", qk_norm=True, experts=Experts(8, 2, 32, dense_layers=(0,)))
    model = write_random_model(tmp_path / "model", experts, seed=4)
    report = doctor(f"model={model}", f"model_config_path={model}")
    assert report.healthy, str(report)
    assert "a random qwen3_moe of 4 layers" in str(report)
    for layout in ("EP2", "PP2 VPP2", "TP2, sequence parallel"):
        assert marks(report, layout) == ["same"] * 4
    assert "TP2  " not in str(report)


def test_only_a_mixture_of_experts_has_expert_parallel_layouts():
    names = {has: {v.name for vs in variants_for(4, has).values() for v in vs} for has in (True, False)}
    assert names[True] - names[False] == {"EP2"}
    assert names[False] - names[True] == {"TP2", "TP2 PP2"}  # experts want sequence parallelism beside TP


# algorithm -> the first quantity that differs, the layout, one that the fault leaves alone
PLANTED = {
    "AveragedPerMicroBatch": ("loss/total", "small micro-batches", "padded rows"),
    "MaskShiftedUnderContextParallelism": ("loss/total", "CP2", "DP2"),
    "MetricCountedTwice": ("policy/length", "CP2", "DP2"),
    "WhitenedPerRank": ("advantages", "DP2", "CP2"),
}


def assert_found(report: object, first: str, layout: str, untouched: str) -> None:
    assert f"FAULT: {first} is the first quantity that differs, on {layout}: " in str(report)
    assert "DIFFERS" in marks(report, layout)
    assert marks(report, untouched) == ["same"] * 4


@pytest.mark.distributed
@pytest.mark.parametrize("algorithm", [name for name in PLANTED if name != "WhitenedPerRank"])
def test_a_planted_fault_is_found_and_its_first_quantity_named(algorithm):
    report = doctor(algorithm=f"{FAULTS}:{algorithm}")
    assert not report.healthy
    assert_found(report, *PLANTED[algorithm])


@pytest.mark.distributed
def test_the_command_prints_the_fault_that_it_finds_and_ends_with_1(monkeypatch, capsys):
    monkeypatch.setattr("megatron_rl.run.doctor.examine.torchrun", forks)
    with pytest.raises(typer.Exit) as ended:
        cli.doctor(CONFIG, algorithm=f"{FAULTS}:WhitenedPerRank")
    assert ended.value.exit_code == 1
    said = capsys.readouterr()
    assert_found(said.out, *PLANTED["WhitenedPerRank"])
    assert "2 ranks: DP2, " in said.err


@pytest.mark.distributed
def test_an_algorithm_that_cannot_run_under_torchrun_is_no_fault_of_the_layout(monkeypatch, capsys):
    monkeypatch.setattr("megatron_rl.run.doctor.examine.torchrun", forks)
    monkeypatch.setattr("os._exit", sys.exit)
    monkeypatch.setattr("sys.argv", ["megatron-rl", "doctor", str(CONFIG), "--algorithm", f"{FAULTS}:Raising"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "the update failed on layout 'one process': ValueError: this algorithm is not finished" in said


@pytest.mark.distributed
def test_torchrun_starts_as_many_ranks_as_asked_and_ends_those_that_take_too_long(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], sys.argv[1:])\n"
        "time.sleep(float(sys.argv[1]))\n"
    )
    assert torchrun([str(program), "0"], 2, tmp_path / "log", 120) == 0
    assert sorted((tmp_path / "log").read_text().splitlines()) == [f"rank {rank} of 2 ['0']" for rank in range(2)]
    assert torchrun([str(program), "600"], 1, tmp_path / "log", 0.1) is None


ONE_CALL = {
    "dpo_pairs": ("dpo", {"beta": 0.1}, True),
    "kto_binary": ("kto", {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}, True),
    "reward_model": ("reward-model", {"use_margins": False}, False),
}


@pytest.mark.parametrize("example", ONE_CALL)
def test_a_trainer_in_one_call_is_examined_with_its_algorithm_s_options_and_reference(example):
    run = load_examined(ROOT / "examples" / example / "config.yaml", ["worker.dtype=bfloat16"])
    name, options, has_reference = ONE_CALL[example]
    assert run.algorithm == {"name": name, **options}
    assert (run.reference is not None) == has_reference
    assert run.actor.dtype == "bfloat16"
    find_algorithm(run)


def test_options_of_one_call_that_change_the_update_reach_the_doctor():
    pairs = ROOT / "examples" / "dpo_pairs" / "config.yaml"
    assert load_examined(pairs, ["dpo.reference_free=true", "dpo.loss=ipo"]).reference is None
    assert load_examined(pairs, ["dpo.loss=ipo"]).algorithm["loss"] == "ipo"
    assert load_examined(ROOT / "examples" / "reward_model" / "config.yaml", ["reward.margin=gap"]).algorithm[
        "use_margins"
    ]
    with pytest.raises(ConfigError, match="one file describes one trainer"):
        load_examined(pairs, ["kto={beta: 0.1}"])
    with pytest.raises(ConfigError, match="id you mean 'beta'"):
        find_algorithm(load_examined(pairs, ["dpo.betta=0.1"]))


@pytest.mark.distributed
def test_the_shipped_kto_is_healthy_on_every_layout():
    report = doctor(config=ROOT / "examples" / "kto_binary" / "config.yaml")
    assert report.healthy, str(report)
    assert "KTO on random preference pairs" in str(report)


def measurement(**changes: object) -> Measured:
    values = {
        "fields": {"advantages": [(0, torch.tensor([1.0, -1.0]))]},
        "metrics": {"loss/total": 0.5, "policy/entropy": 2.0},
        "gradients": {"actor's w": torch.tensor([[0.1, 0.2]])},
    }
    return Measured(**(values | changes))


def test_a_rank_of_a_replica_that_holds_something_else_is_a_difference():
    copies = [(0, torch.tensor([1.0, -1.0])), (0, torch.tensor([1.0, -1.1]))]
    (found,) = differences(measurement(), measurement(fields={"advantages": copies}))
    assert (found.step, found.quantity) == ("fields", "advantages")
    assert "on rank 1 of each replica" in found.detail


def test_quantities_are_told_in_the_order_of_computation():
    other = measurement(
        gradients={"actor's w": torch.tensor([[0.1, 0.4]])}, metrics={"loss/total": 0.6, "policy/entropy": float("nan")}
    )
    assert [d.quantity for d in differences(measurement(), other)] == [
        "loss/total",
        "gradient of actor's w",
        "policy/entropy",
    ]


def test_rounding_is_no_difference():
    other = measurement(
        fields={"advantages": [(0, torch.tensor([1.00001, -1.0]))]},
        metrics={"loss/total": 0.500001, "policy/entropy": 2.00001},
        gradients={"actor's w": torch.tensor([[0.10001, 0.2]])},
    )
    assert list(differences(measurement(), other)) == []


@pytest.mark.distributed
def test_of_a_model_without_a_family_the_update_is_compared_under_fsdp2(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "olmo2", "num_hidden_layers": 2}')
    lines: list[str] = []
    config = load_examined(CONFIG, [f"model_config_path={tmp_path}"])
    report = examine(config, max_ranks=2, timeout=300, launch=forks, progress=lines.append)
    assert report.healthy, str(report)
    assert "under FSDP2" in lines[0]
    for layout in ("small micro-batches", "padded rows", "DP2"):
        assert marks(report, layout) == ["same"] * 4
    assert not {"TP2", "PP2", "CP2"} & set(str(report).split())
