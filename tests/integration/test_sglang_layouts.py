"""Rollout layouts against SGLang's own model classes and loader, bit for bit, at tensor-parallel sizes 1, 2 and 4, and
with two expert-parallel ranks of two tensor-parallel ones each."""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path

import pytest
import torch
from families import FAMILIES, YARN
from integration.environment import SHIM, own_sglang_python
from matrix.reference import slug
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from megatron_rl.models import rollout_layout
from megatron_rl.models.hf_config import architecture_from_hf, hf_config_from
from megatron_rl.rollout.sglang.model_folder import EXPERTS_EVERYWHERE
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.source import SafetensorsFolder

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1500)]
# SGLang has no biases in feed-forward layers, and leaves those of a file out: `rollout/sglang/model_folder.py` refuses.
SERVED = {name: copy.deepcopy(config) for name, config in FAMILIES.items() if not getattr(config, "mlp_bias", False)}
for config in SERVED.values():
    if config.model_type in EXPERTS_EVERYWHERE:  # `SGLangEngine.check_model` refuses dense layers among them
        config.mlp_only_layers = []
CASES = [(name, tp, 1) for name in SERVED for tp in (1, 2, 4)]
CASES += [(name, 4, 2) for name, config in SERVED.items() if hasattr(config, "num_experts_per_tok")]
CASES.remove(("gpt_oss", 4, 2))  # SGLang's loader of its bf16 files (weight_loader_fused) fails with expert parallelism


def served(config: PretrainedConfig) -> PretrainedConfig:
    """As servers get it; on a CPU SGLang knows DeepSeek's positions with YaRN only, which no layout depends on."""
    exported = hf_config_from(architecture_from_hf(config), dtype="bfloat16")
    if config.model_type.startswith("deepseek"):
        exported.rope_parameters = exported.rope_parameters | YARN
    return exported


def as_on_gpus(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """gpt-oss's experts as ``moe_runner_backend=triton_kernel`` has them, which needs a GPU: others transpose them."""
    turned = ("w13_weight", "w2_weight") if name == "gpt_oss" else ()
    return {key: each.transpose(1, 2) if turned and key.endswith(turned) else each for key, each in tensors.items()}


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the models, and what SGLang made of them."""
    python, folder = own_sglang_python(), tmp_path_factory.mktemp("shards")
    torch.manual_seed(0)
    for name, config in SERVED.items():
        model = AutoModelForCausalLM.from_config(served(config), dtype=torch.bfloat16)
        buffers = (buffer for key, buffer in model.named_buffers() if "correction_bias" in key)
        for tensor in (*model.parameters(), *buffers):  # norms and biases would otherwise be constant
            torch.nn.init.normal_(tensor)
        model.save_pretrained(folder / slug(name))
    program = Path(__file__).with_name("sglang_shards.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(SHIM), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [python, str(program), str(folder), *(str(folder / slug(name)) for name in SERVED)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    return folder


@pytest.mark.parametrize(("name", "tp", "ep"), CASES)
def test_shards_are_bitwise_those_of_sglangs_own_loader(held: Path, name: str, tp: int, ep: int) -> None:
    layout = rollout_layout(architecture_from_hf(SERVED[name]), tp, [list(range(tp))], ep)
    with SafetensorsFolder(held / slug(name)) as source:
        for rank in range(tp):
            ours = empty_tensors(layout, rank, layout.dtypes(torch.bfloat16))
            fill(layout, rank, ours, source)
            theirs = as_on_gpus(name, load_file(held / f"{slug(name)}-tp{tp}-ep{ep}-{rank}.safetensors"))
            assert sorted(ours) == sorted(theirs)
            for key, tensor in theirs.items():
                assert ours[key].dtype == tensor.dtype, f"{key} on rank {rank}"
                assert torch.equal(ours[key], tensor), f"{key} on rank {rank}"
