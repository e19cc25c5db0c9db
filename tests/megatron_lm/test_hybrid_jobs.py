"""Jobs whose chunks are Megatron-Core's `HybridModel`, taken over on several layouts: every step is that of a
`GPTModel` with the same weights in one process, and the exported model has the logits of the job's own chunks.

`make test-hybrid` runs them in an environment with megatron-core 0.19; elsewhere there is no such class.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import run_ranks
from transformers import AutoModelForCausalLM

from megatron_rl.models import Experts
from megatron_rl.run.doctor.random_data import PLAIN, write_random_model

PROGRAM = Path(__file__).with_name("hybrid_program.py")
# layout -> the job of a `GPTModel`, in one process, that takes the same steps
ALONE = {"hybrid": "fp32", "hybrid_tied": "tied_fp32", "hybrid_experts": "experts_fp32"}
ALONE |= {"lora_hybrid": "lora", "lora_hybrid_experts": "lora_experts"}
ON_TWO = {"hybrid_tp2": "fp32", "hybrid_pp2": "fp32", "hybrid_pp2vpp2": "fp32", "lora_hybrid_pp2": "lora"}
RESUMED = {1: ["hybrid_experts", "lora_hybrid"], 2: ["hybrid_pp2", "hybrid_pp2vpp2", "lora_hybrid_pp2"]}
ON_FOUR = {"hybrid_tp2pp2": "tied_fp32", "hybrid_experts_pp2ep2": "experts_fp32"}
HYBRID = ALONE | ON_TWO | ON_FOUR
TEXT = torch.arange(3, 19).view(2, 8)
SKIP = importlib.util.find_spec("megatron.core.models.hybrid") is None

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(SKIP, reason="this megatron-core has no HybridModel: make test-hybrid"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that the jobs begin with."""
    folder, model = tmp_path_factory.mktemp("jobs"), replace(PLAIN, norm_eps=1e-5)
    write_random_model(folder / "models" / "plain", model, 1)
    write_random_model(folder / "models" / "tied", replace(model, tied=True), 2)
    experts = Experts(num_experts=4, experts_per_token=2, ffn=64)
    write_random_model(
        folder / "models" / "experts", replace(model, family="qwen3_moe", qk_norm=True, experts=experts), 3
    )
    return folder


@pytest.fixture(scope="module")
def steps(folder: Path) -> dict[str, list[dict[str, float]]]:
    """The metrics of three GRPO steps and a DPO step of each case."""
    found = {}
    gpt = sorted(set(HYBRID.values()))
    for world, cases in ((1, [*gpt, *ALONE, "refusals"]), (2, [*ON_TWO]), (4, [*ON_FOUR])):
        again = [f"resumed {case}" for case in RESUMED.get(world, ())]
        for line in run_ranks(PROGRAM, world, str(folder), *cases, *again, timeout=280).splitlines():
            if line.startswith("RESUMED "):
                found[line] = []
            elif line.startswith("RESULT "):
                case, metrics = json.loads(line.removeprefix("RESULT "))
                found[case] = metrics
    return found


@pytest.mark.parametrize("case", HYBRID)
def test_steps_are_those_of_a_gpt_model_in_one_process(steps, case):
    expected, found = steps[HYBRID[case]], steps[case]
    assert len(found) == len(expected) == 4
    for step, (alone, metrics) in enumerate(zip(expected, found, strict=True)):
        assert set(metrics) == set(alone)
        for name, value in alone.items():
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), (step, name)
    assert expected[2]["loss/kl"] > 0.3  # two steps have moved the policy


@pytest.mark.parametrize("case", HYBRID)
def test_the_exported_model_has_the_logits_of_the_jobs_own_chunks(steps, folder, case):
    own = torch.load(folder / f"{case}.pt", weights_only=True)
    exported = AutoModelForCausalLM.from_pretrained(folder / case, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found = exported.eval()(TEXT).logits
    assert found.abs().max() > 0.5
    assert (own - found).abs().max() <= 1e-5 * found.abs().max()


@pytest.mark.parametrize("case", [case for cases in RESUMED.values() for case in cases])
def test_the_step_after_a_restart_is_the_step_without_one(steps, case):
    assert f"RESUMED {case}" in steps


REFUSED = {
    "mamba": r"hybrid_layer_pattern='M\*-' with 'M' \(Mamba\); supported is",
    "latent attention": r"with '\+' \(latent attention\)",
    "attention only": r"hybrid_layer_pattern='\*\*\*-' with attention and feed-forward layers that do not alternate",
    "a stage that parts a pair": r"hybrid_layer_pattern='\*\|-\*-', of which a pipeline stage gets '\*'",
    "multi-token prediction": r"hybrid_layer_pattern='\*-\*-/\*-' with multi-token prediction",
    "no positions": "position_embedding_type='none'; supported is position_embedding_type: 'rope'",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_decoder_has_is_refused_by_name(steps, folder, what):
    said = json.loads((folder / "refusals.json").read_text())[what]
    assert re.search(REFUSED[what], said), said


def test_rotary_base_and_percent_are_read_off_the_frequencies(steps, folder):
    assert json.loads((folder / "refusals.json").read_text())["rotary"] == [500000.0, 0.5, "linear", 4.0]
