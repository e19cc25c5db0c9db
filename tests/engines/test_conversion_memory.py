"""Conversion holds some rows of a tensor at a time: less than a model's largest tensor, and far less than the model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from resident_memory import growth
from transformers import Qwen2Config

import megatron_rl
from megatron_rl.engines.conversion import convert
from megatron_rl.models import logical_tensors
from megatron_rl.models.hf_config import architecture_from_hf
from megatron_rl.models.safetensors_files import SafetensorsWriter
from megatron_rl.parallel import ParallelSizes

assert megatron_rl  # installs the CPU face before megatron.core is imported

MIB = 1 << 20
LIMIT = 96 * MIB  # twelve blocks
SHAPE = {"hidden_size": 2048, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 4}
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 16, "num_key_value_heads": 4}


def write_folder(folder: Path, vocab: int, shape: dict[str, int]) -> int:
    """A model whose weights are holes of its file, which take no room; returns its bytes."""
    config = Qwen2Config(vocab_size=vocab, num_hidden_layers=2, tie_word_embeddings=True, dtype="bfloat16", **shape)
    folder.mkdir(parents=True)
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    shapes = {name: (size, torch.bfloat16) for name, size in logical_tensors(architecture_from_hf(config)).items()}
    path = folder / "model.safetensors"
    with pytest.raises(AssertionError, match="were not written"), SafetensorsWriter(path, shapes):
        pass
    header = path.stat().st_size
    entries = json.loads(path.read_bytes()[8:header])
    size = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    with path.open("r+b") as file:
        file.truncate(header + size)
    return size


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where there is such a file system: the time of disks is not the subject."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        yield Path(name)


def test_all_ways_stay_far_below_the_size_of_the_model_and_of_its_largest_tensor(folder) -> None:
    write_folder(folder / "tiny-hf", 256, TINY)
    size = write_folder(folder / "hf", 40960, SHAPE)
    assert size > 280 * MIB
    assert 1.5 * LIMIT < 40960 * 2048 * 2
    sizes = ParallelSizes(tp=2, pp=2)
    ways = [("hf", "megatron", "megatron"), ("megatron", "other", "megatron"), ("other", "back", "hf")]
    for source, target, to in ways:  # what is loaded late is loaded now
        names = (f"tiny-{name}" for name in (source, target))
        convert(*(folder / name for name in names), to, sizes)
    for (source, target, to), layout in zip(ways, (sizes, ParallelSizes(tp=4), None), strict=True):
        grown = growth(lambda s=source, t=target, k=to, at=layout: convert(folder / s, folder / t, k, at))
        assert grown < LIMIT, f"{source} -> {target}: {grown / MIB:.0f} MiB"
        assert sum(path.stat().st_size for path in (folder / target).rglob("*")) >= size
