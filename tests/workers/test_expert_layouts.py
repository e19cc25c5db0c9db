"""Training a mixture of experts gives the same numbers on every layout, with real ranks: expert parallelism alone and
with every other axis, in GRPO and in DPO. Losses, gradient norms and every tensor's gradient against one process.

The router's auxiliary losses are off in models that are built here. A job's own model may have them.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.models.architecture import Experts
from megatron_rl.run.doctor.random_data import PLAIN, write_random_model

PROGRAM = Path(__file__).with_name("expert_program.py")
MODEL = replace(PLAIN, family="qwen3_moe", num_layers=4, qk_norm=True, experts=Experts(4, 2, 32, dense_layers=(1,)))
WORLDS = {
    1: ("one", "own", "own_auxiliary", "own_auxiliary_per_token"),
    2: ("dp2", "ep2", "ep2_small_micro_batches", "ep2_padded", "ep2_recompute", "cp2ep2", "tp2", "tp2ep2"),
    4: ("dp4ep2", "ep4", "tp2ep2dp2", "pp2ep2", "cp2ep2dp2", "pp2vpp2ep2"),
}
LAYOUTS = [case for cases in WORLDS.values() for case in cases if case != "one" and "auxiliary" not in case]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    write_random_model(folder / "actor", MODEL, seed=1)
    write_random_model(folder / "reference", MODEL, seed=2)
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[tuple[str, str], dict[str, float]]:
    found = {}
    for world, cases in WORLDS.items():
        for line in run_ranks(PROGRAM, world, str(folder), *cases, timeout=300).splitlines():
            if line.startswith("RESULT "):
                case, algorithm, metrics = json.loads(line.removeprefix("RESULT "))
                found[case, algorithm] = metrics
    return found


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t.double() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def gradients(folder: Path, case: str, algorithm: str) -> dict[str, Tensor]:
    """The change of every weight, in single precision: its learning rate was 1."""
    before, after = weights(folder / "actor"), weights(folder / f"{case} {algorithm}")
    return {name: before[name] - after[name] for name in before}


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_layout_changes_neither_loss_nor_gradient_norm_nor_metrics(results, case, algorithm):
    one, other = results["one", algorithm], results[case, algorithm]
    for name in ("loss/total", "optimizer/gradient_norm"):
        assert math.isclose(other[name], one[name], rel_tol=1e-5), name
    assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    assert one["optimizer/gradient_norm"] > 0.5


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_layout_changes_no_gradient_of_expert_router_or_other_weight(results, folder, case, algorithm):
    one, other = gradients(folder, "one", algorithm), gradients(folder, case, algorithm)
    for name, gradient in one.items():
        rounding = 1.2e-7 * gradient.numel() ** 0.5 * (1.0 if "norm" in name else 0.25)  # of the weights
        assert (other[name] - gradient).norm() <= 1e-5 * gradient.norm() + rounding, name
        assert gradient.norm() > 100 * rounding or "norm" in name, name


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_gradient_norm_counts_every_weight_once(results, folder, algorithm):
    for case in ("one", *LAYOUTS):
        squares = sum(float(gradient.square().sum()) for gradient in gradients(folder, case, algorithm).values())
        assert math.isclose(results[case, algorithm]["optimizer/gradient_norm"], math.sqrt(squares), rel_tol=1e-5), case


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_a_jobs_own_router_losses_weigh_the_same_in_both_of_megatrons_conventions(results, folder, algorithm):
    """With `calculate_per_token_loss` Megatron multiplies them by the positions of a micro-batch, for its training loop
    divides by all tokens at the end."""
    means, sums = (gradients(folder, case, algorithm) for case in ("own_auxiliary", "own_auxiliary_per_token"))
    without = gradients(folder, "own", algorithm)
    for name, gradient in means.items():
        assert torch.allclose(sums[name], gradient, rtol=1e-4, atol=1e-6), name
        assert not torch.allclose(without[name], gradient, rtol=1e-2, atol=1e-4) or ".mlp.gate." not in name, name
