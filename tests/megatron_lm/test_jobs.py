"""Jobs of Megatron-LM's kind, taken over on several layouts: losses against one process, and logits of the exported
model against those of the job's own chunks."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from forked import run_ranks
from transformers import AutoModelForCausalLM

from megatron_rl.models import Experts
from megatron_rl.run.doctor.random_data import PLAIN, write_random_model

PROGRAM = Path(__file__).with_name("job_program.py")
ALONE = ("fp32", "bf16", "fp16", "tied", "experts", "packed", "torch_adam")
ON_FOUR = {
    "fp32_tp2pp2": "fp32",
    "bf16_tp2pp2": "bf16",
    "bf16_pp2vpp2dp2": "bf16",
    "fp16_tp2dp2": "fp16",
    "tied_tp2pp2": "tied",
    "experts_pp2ep2": "experts",
    "packed_tp2pp2": "packed",
    "torch_adam_tp2pp2": "torch_adam",
    "torch_adam_tp2dp2": "torch_adam",
}
TEXT = torch.arange(3, 19).view(2, 8)

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Ran:
    """All cases: where their models lie, and the metrics of their steps."""

    folder: Path
    steps: dict[str, list[dict[str, float]]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("jobs")
    model = replace(PLAIN, norm_eps=1e-5)
    write_random_model(folder / "models" / "plain", model, 1)
    write_random_model(folder / "models" / "tied", replace(model, tied=True), 2)
    experts = Experts(num_experts=4, experts_per_token=2, ffn=64)
    write_random_model(
        folder / "models" / "experts", replace(model, family="qwen3_moe", qk_norm=True, experts=experts), 3
    )
    steps = {}
    for world, cases in ((1, ALONE), (4, ON_FOUR)):
        for line in run_ranks(PROGRAM, world, str(folder), *cases, timeout=280).splitlines():
            if line.startswith("RESULT "):
                case, found = json.loads(line.removeprefix("RESULT "))
                steps[case] = found
    return Ran(folder, steps)


# fp32 sums in another order. In bf16 and fp16 (8 and 11 bits) each tensor-parallel rank rounds its partial sum before
# they are added, and every layer rounds its products: eight and sixteen last bits for what four steps make of it, and
# a logit by four and two.
STEPS = {"fp32": 1e-5, "torch_adam": 1e-5, "fp16": 2.0**-7}
LOGITS = {"fp32": 1e-5, "torch_adam": 1e-5, "fp16": 2.0**-10}
BF16_STEPS, BF16_LOGITS = 2.0**-5, 2.0**-6


@pytest.mark.parametrize("case", ON_FOUR)
def test_steps_are_those_of_one_process(ran, case):
    alone, found = ran.steps[ON_FOUR[case]], ran.steps[case]
    tolerance = STEPS.get(ON_FOUR[case], BF16_STEPS)
    assert len(found) == len(alone) == 4
    for step, (expected, metrics) in enumerate(zip(alone, found, strict=True)):
        assert set(metrics) == set(expected)
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=tolerance, abs=tolerance * 0.01), (step, name)
    assert alone[2]["loss/kl"] > 0.5  # two steps have moved the policy
    assert all(step["optimizer/gradient_norm"] > 0.1 for step in alone)


@pytest.mark.parametrize("case", [*ALONE, *ON_FOUR])
def test_the_exported_model_has_the_logits_of_the_jobs_own_chunks(ran, case):
    own = torch.load(ran.folder / f"{case}.pt", weights_only=True)
    exported = AutoModelForCausalLM.from_pretrained(ran.folder / case, dtype=torch.float32, attn_implementation="eager")
    has_experts = ON_FOUR.get(case, case) == "experts"
    with torch.no_grad():
        found = exported.eval()(TEXT, **({"output_router_logits": True} if has_experts else {}))
    scale = found.logits.abs().max()
    assert scale > 0.5
    sure = routed_for_sure(found.router_logits, 2) if has_experts else torch.ones(TEXT.shape, dtype=torch.bool)
    assert sure.sum() >= TEXT.numel() / 2
    difference = (own - found.logits).abs()[sure]
    assert difference.max() <= LOGITS.get(ON_FOUR.get(case, case), BF16_LOGITS) * scale


def routed_for_sure(router_logits: tuple[torch.Tensor, ...], experts_per_token: int) -> torch.Tensor:
    """Positions whose experts do not hang on how bf16 rounds, which differs between processors: in every layer the last
    chosen expert leads the next one by two last bits, there and at the positions before, which attention reads."""
    sure = torch.ones(TEXT.shape, dtype=torch.bool)
    for logits in router_logits:
        ranked = logits.view(*TEXT.shape, -1).sort(-1, descending=True).values
        sure &= ranked[..., experts_per_token - 1] - ranked[..., experts_per_token] > 2.0**-7
    return sure.int().cummin(-1).values.bool()
