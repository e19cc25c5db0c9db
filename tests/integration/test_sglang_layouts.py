"""Rollout layouts against SGLang's own model classes and loader, bit for bit, at tensor-parallel sizes 1, 2 and 4, and
with two expert-parallel ranks of two tensor-parallel ones each."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from integration.environment import SHIM, sglang_python
from rollout.rollout_models import CONFIGS, architecture_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_rl.models import rollout_layout
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.source import SafetensorsFolder

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "qwen3_moe", "mixtral", "qwen2_moe", "glm4_moe")
FAMILIES += ("deepseek_v3", "moonlight", "deepseek_v2")
CASES = [(family, tp, 1) for family in FAMILIES for tp in (1, 2, 4)]
CASES += [(family, 4, 2) for family in FAMILIES if hasattr(CONFIGS[family], "num_experts_per_tok")]
# Sizes that each of 4 ranks holds a part of, and heads that are repeated at 4; the vocabulary needs padding.
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "vocab_size": 250}
LATENT = {"num_key_value_heads": 8, "vocab_size": 250}
OWN = {
    "qwen2_moe": {"head_dim": 8, "mlp_only_layers": []},  # SGLang has experts in all of its layers
    "deepseek_v3": LATENT,
    "moonlight": LATENT,
    "deepseek_v2": LATENT,
}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the models, and what SGLang made of them."""
    python, folder = sglang_python(), tmp_path_factory.mktemp("shards")
    torch.manual_seed(0)
    for family in FAMILIES:
        config = type(CONFIGS[family])(**CONFIGS[family].to_dict() | SIZES | OWN.get(family, {"head_dim": 8}))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        buffers = (buffer for name, buffer in model.named_buffers() if "correction_bias" in name)
        for tensor in (*model.parameters(), *buffers):  # norms and biases would otherwise be constant
            torch.nn.init.normal_(tensor)
        model.save_pretrained(folder / family)
    program = Path(__file__).with_name("sglang_shards.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(SHIM), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [python, str(program), str(folder), *(str(folder / family) for family in FAMILIES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    return folder


@pytest.mark.parametrize(("family", "tp", "ep"), CASES)
def test_shards_are_bitwise_those_of_sglangs_own_loader(held: Path, family: str, tp: int, ep: int) -> None:
    config = type(CONFIGS[family]).from_pretrained(held / family)
    architecture = architecture_of(config)
    architecture = architecture if architecture.mla else replace(architecture, head_dim=8)
    layout = rollout_layout(architecture, tp, [list(range(tp))], ep)
    with SafetensorsFolder(held / family) as source:
        for rank in range(tp):
            ours = empty_tensors(layout, rank, layout.dtypes(torch.bfloat16))
            fill(layout, rank, ours, source)
            theirs = load_file(held / f"{family}-tp{tp}-ep{ep}-{rank}.safetensors")
            assert sorted(ours) == sorted(theirs)
            for name, tensor in theirs.items():
                assert ours[name].dtype == tensor.dtype, f"{name} on rank {rank}"
                assert torch.equal(ours[name], tensor), f"{name} on rank {rank}"
