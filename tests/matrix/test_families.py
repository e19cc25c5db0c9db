"""The proof of every family: logits, bits, steps and samples in every layout; see `matrix_program.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import FAMILIES
from forked import run_ranks
from matrix.matrix_program import layouts_of
from matrix.reference import slug, write

from megatron_rl.models.family import FAMILIES as REGISTERED
from megatron_rl.models.family import ModelFamily, family_of
from megatron_rl.models.hf_config import architecture_from_hf, hf_config_from

PROGRAM = Path(__file__).with_name("matrix_program.py")
LIMITS = {"logits": 1e-4, "step": 1e-6, "local": 1e-4}
EXPECTED = {
    name: [*layouts_of(architecture_from_hf(config)), *(f"local engine, tp{tp}" for tp in (1, 2, 4)), "checkpoint"]
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


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, dict[str, float]]]:
    root = tmp_path_factory.mktemp("matrix")
    for name, config in FAMILIES.items():
        write(root, name, config)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in FAMILIES}
    for line in run_ranks(PROGRAM, 4, str(root), timeout=600).splitlines():
        if line.startswith("RESULT "):
            name, layout, errors = json.loads(line.removeprefix("RESULT "))
            found[name][layout] = errors
    return found


@pytest.mark.distributed
@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_computes_what_transformers_does(results, name: str) -> None:
    assert list(results[name]) == EXPECTED[name]
    worst = {kind: max(errors[kind] for errors in results[name].values() if kind in errors) for kind in LIMITS}
    print(f"{slug(name)}: " + ", ".join(f"{kind} {error:.1e}" for kind, error in worst.items()))
    for layout, errors in results[name].items():
        for kind, error in errors.items():
            assert error <= LIMITS[kind], f"{name}, {layout}: {kind} off by {error}"
