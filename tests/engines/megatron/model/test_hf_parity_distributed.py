"""Hugging Face models on four gloo ranks against `transformers`: see `parity_program.py`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from engines.megatron.model.parity_program import CASES, CONVERSIONS
from forked import run_ranks
from models.oracle import ALL
from transformers import AutoModelForCausalLM

from megatron_rl.models.hf_config import hf_config_from

PROGRAM = Path(__file__).with_name("parity_program.py")


LINES = [f"parity {name} {sizes}" for name, sizes in CASES if name != "stories" or SHARED]
LINES += [f"converted {name} {sizes}" for name, sizes in CONVERSIONS]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def held(tmp_path_factory, seeded_model) -> list[str]:
    folder = tmp_path_factory.mktemp("parity")
    for architecture in ALL:
        if architecture.family == "llama":
            architecture = replace(architecture, num_layers=5)  # uneven stages
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_config(hf_config_from(architecture, dtype="float32"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
            for name, buffer in model.named_buffers():
                if "correction_bias" in name:
                    buffer.normal_(std=0.3)
        model.save_pretrained(folder / architecture.family)
    shutil.copytree(seeded_model, folder / "seeded")
    if SHARED:
        shutil.copytree(SHARED / "models" / "stories260k-hf", folder / "stories")
    return run_ranks(PROGRAM, 4, str(folder), timeout=300).splitlines()


@pytest.mark.parametrize("line", LINES)
def test_logits_names_and_bits_survive_a_layout(held, line) -> None:
    assert held.count(line) == 1
    assert len(LINES) == 28 + (SHARED is not None)
