"""Episodes in flows: the same at every layout, with rewards of the environment alone or added, and with failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forked import run_ranks

PROGRAM = Path(__file__).with_name("flow_program.py")
LAYOUTS = {"one": (1, 1, 1), "tp2": (2, 2, 2), "tp2 in two replicas": (2, 2, 1), "dp2": (2, 1, 1)}


@pytest.fixture(scope="module")
def found(seeded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("flow")
    for name, (ranks, tp, rollout_tp) in LAYOUTS.items():
        run_ranks(PROGRAM, ranks, str(seeded_model), str(folder / name), str(tp), str(rollout_tp), timeout=240)
    return {name: json.loads((folder / name).read_text()) for name in LAYOUTS}


@pytest.mark.distributed
def test_a_layout_changes_no_episode(found: dict[str, dict[str, Any]]) -> None:
    one = found["one"]
    assert one["alone/turns"] > 1
    assert {sample[4] for sample in one["alone"]} <= {"stop", "length", "turns"}
    assert len(one["alone"]) == 12
    for name, other in found.items():
        assert other["alone"] == one["alone"], name
        assert other["alone/loss"] == pytest.approx(one["alone/loss"], abs=1e-5)
        assert [s[:5] for s in other["added"]] == [s[:5] for s in one["added"]], name
        assert other["eval"] == pytest.approx(one["eval"], abs=1e-6)


@pytest.mark.distributed
def test_rewards_are_the_environments_and_those_of_reward_functions_are_added(found: dict[str, dict[str, Any]]) -> None:
    alone, added = found["one"]["alone"], found["one"]["added"]
    assert {sample[5] for sample in alone} <= {0.0, 1.0, 2.0, 3.0}
    assert any(sample[5] for sample in alone)
    assert all(0 < sample[5] % 1 <= 0.5 for sample in added)


@pytest.mark.distributed
def test_a_failing_environment_stops_every_rank_or_costs_its_own_samples(found: dict[str, dict[str, Any]]) -> None:
    for name, other in found.items():
        assert other["kept"] == [0, 2, 3], name
        for text in other["failure"]:
            assert "prompt 1, sample 0, turn 1: environment" in text, name
            assert "OSError: no connection" in text
