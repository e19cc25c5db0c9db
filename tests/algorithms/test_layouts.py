"""Two updates of every algorithm on real Megatron-Core: the same metrics on every layout, with real ranks."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from forked import run_ranks

from megatron_rl.algorithms import ALGORITHMS

PROGRAM = Path(__file__).with_name("layout_program.py")
WORLDS = {
    1: ("one", "one_padded"),
    2: ("tp2", "tp2_sp", "cp2", "dp2", "pp2", "pp2vpp2"),
    4: ("tp2pp2",),
}
LAYOUTS = [layout for layouts in WORLDS.values() for layout in layouts if layout != "one"]

pytestmark = pytest.mark.distributed


@functools.cache
def results(model: str) -> dict[str, dict[str, dict[str, float]]]:
    found = {}
    for world, layouts in WORLDS.items():
        for line in run_ranks(PROGRAM, world, model, *layouts, timeout=500).splitlines():
            if line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
                found[result["layout"]] = result["metrics"]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_metric_of_any_algorithm_depends_on_the_layout(seeded_model, layout):
    one, other = results(str(seeded_model))["one"], results(str(seeded_model))[layout]
    assert {name.split()[0] for name in one} == set(ALGORITHMS)
    for name, metrics in one.items():
        assert other[name] == pytest.approx(metrics, rel=2e-4, abs=2e-5), name


def test_every_algorithm_has_a_gradient(seeded_model):
    for name, metrics in results(str(seeded_model))["one"].items():
        assert metrics["optimizer/gradient_norm"] > 1e-3, name
