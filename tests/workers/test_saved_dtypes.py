"""A model in training is saved in the dtypes of the folder that it came from, unless one is asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_run import write_run
from transformers import AutoTokenizer

from megatron_rl.workers import Actor


def read(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_fp32_norms_beside_bf16_weights_are_saved_as_they_were(tmp_path: Path) -> None:
    write_run(tmp_path)
    folder = tmp_path / "model"
    stored = {name: t.float() if "norm" in name else t.bfloat16() for name, t in read(folder).items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    actor = Actor(str(folder), AutoTokenizer.from_pretrained(folder))
    actor.save_pretrained(tmp_path / "saved")
    saved = read(tmp_path / "saved")
    assert {name: tensor.dtype for name, tensor in saved.items()} == {n: t.dtype for n, t in stored.items()}
    assert all(torch.equal(saved[name], stored[name]) for name in stored)
    actor.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert {tensor.dtype for tensor in read(tmp_path / "half").values()} == {torch.float16}
