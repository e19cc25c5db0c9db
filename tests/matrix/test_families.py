"""The proof of every family: logits, bits, steps and samples in every layout; see `matrix_program.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import FAMILIES
from forked import run_ranks
from matrix.matrix_program import LAYOUTS, layouts_of
from matrix.reference import slug, write

from megatron_rl.models.family import FAMILIES as REGISTERED
from megatron_rl.models.family import ModelFamily, family_of
from megatron_rl.models.hf_config import architecture_from_hf, hf_config_from

PROGRAM = Path(__file__).with_name("matrix_program.py")
LIMITS = {"logits": 1e-4, "step": 1e-6, "local": 1e-4}
EXPECTED = {
    name: [
        *(layout for ranks in LAYOUTS for layout in layouts_of(architecture_from_hf(config), ranks)),
        *(f"local engine, tp{tp}" for tp in (1, 2, 4)),
        "checkpoint",
    ]
    for name, config in FAMILIES.items()
}


def test_every_registered_family_has_an_entry() -> None:
    assert {config.model_type for config in FAMILIES.values()} == set(REGISTERED)


@pytest.mark.parametrize("name", FAMILIES)
def test_configs_survive_both_ways(name: str) -> None:
    architecture = architecture_from_hf(FAMILIES[name])
    family: ModelFamily = family_of(architecture.family)
    assert architecture_from_hf(hf_config_from(architecture)) == architecture
    assert hf_config_from(architecture).architectures == [family.hf_class]


@pytest.mark.distributed
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, FAMILIES[name])
    folder = str(tmp_path / slug(name))
    lines = "".join(run_ranks(PROGRAM, ranks, folder, timeout=280) for ranks in LAYOUTS).splitlines()
    marked = (line.removeprefix("RESULT ") for line in lines if line.startswith("RESULT "))
    results: dict[str, dict[str, float]] = dict(map(json.loads, marked))
    assert list(results) == EXPECTED[name]
    worst = {kind: max(errors.get(kind, 0.0) for errors in results.values()) for kind in LIMITS}
    print(f"{slug(name)}: " + ", ".join(f"{kind} {error:.1e}" for kind, error in worst.items()))
    for layout, errors in results.items():
        for kind, error in errors.items():
            assert error <= LIMITS[kind], f"{name}, {layout}: {kind} off by {error}"
