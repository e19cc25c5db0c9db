"""Real torchrun, four gloo ranks: see `parity_program.py`."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import run_ranks
from models.oracle import ALL
from transformers import AutoModelForCausalLM

from megatron_rl.models.hf_config import hf_config_from

PROGRAM = Path(__file__).with_name("parity_program.py")


@pytest.mark.distributed
def test_logits_names_and_bits_survive_every_layout(tmp_path, stories_model) -> None:
    for architecture in ALL:
        if architecture.family == "llama":
            architecture = replace(architecture, num_layers=5)  # uneven stages
        torch.manual_seed(2)
        model = AutoModelForCausalLM.from_config(hf_config_from(architecture, dtype="float32"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
        model.save_pretrained(tmp_path / architecture.family)
    shutil.copytree(stories_model, tmp_path / "stories")
    output = run_ranks(PROGRAM, 4, str(tmp_path), timeout=300)
    assert output.count("parity ") == 15, output
    assert output.count("converted ") == 3, output
