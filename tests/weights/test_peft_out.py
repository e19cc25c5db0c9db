"""A PEFT folder from the parts of all ranks: whole matrices, complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models.oracle import LLAMA
from safetensors.torch import load_file

from megatron_rl.config import ConfigError
from megatron_rl.models import megatron_layout
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.weights.peft_out import AdapterPart, assembled, parts_of, write_peft

FACTS = {"r": 2, "lora_alpha": 4.0, "lora_dropout": 0.0}


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_parts_of_any_tensor_parallel_size_give_the_same_matrices(tp: int) -> None:
    """8 query heads and 4 key/value heads in groups of [q q k v], 4 rows each; TP8 cuts groups in half."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 24, generator=generator), torch.randn(64, 2, generator=generator)
    down_a, down_b = torch.randn(2, 32, generator=generator), torch.randn(24, 2, generator=generator)
    layout = megatron_layout(LLAMA, RankGrid(ParallelSizes(tp=tp), tp), 64)
    parts: list[AdapterPart] = []
    for rank in range(tp):
        shards = {shard.name: shard for shard in layout.shards(rank)}
        qkv = shards["decoder.layers.1.self_attention.linear_qkv.weight"]
        parts += parts_of(qkv, a, b.chunk(tp)[rank], row_parallel=False)
        fc2 = shards["decoder.layers.1.mlp.linear_fc2.weight"]
        parts += parts_of(fc2, down_a.chunk(tp, 1)[rank], down_b, row_parallel=True)
    found = assembled(parts)
    layer, groups = "base_model.model.model.layers.1.", b.view(4, 4, 4, 2)
    for letter, heads in (("q", groups[:, :2]), ("k", groups[:, 2]), ("v", groups[:, 3])):
        assert torch.equal(found[f"{layer}self_attn.{letter}_proj.lora_A.weight"], a)
        assert torch.equal(found[f"{layer}self_attn.{letter}_proj.lora_B.weight"], heads.reshape(-1, 2))
    assert torch.equal(found[f"{layer}mlp.down_proj.lora_A.weight"], down_a)
    assert torch.equal(found[f"{layer}mlp.down_proj.lora_B.weight"], down_b)
    assert len(found) == 8


def test_a_missing_part_is_no_matrix() -> None:
    with pytest.raises(AssertionError, match="has holes"):
        assembled([AdapterPart("x", (2, 0), torch.ones(2, 2))])


def test_an_existing_folder_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    folder = tmp_path / "adapters"
    write_peft(folder, {name: torch.ones(2, 3)}, FACTS, "base", overwrite=False)
    with pytest.raises(ConfigError, match="exists: give another folder"):
        write_peft(folder, {name: torch.zeros(2, 3)}, FACTS, "base", overwrite=False)
    assert load_file(folder / "adapter_model.safetensors")[name].all()
    write_peft(folder, {name: torch.zeros(2, 3)}, FACTS, "base", overwrite=True)
    assert not load_file(folder / "adapter_model.safetensors")[name].any()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["target_modules"], config["r"], config["base_model_name_or_path"]) == (["up_proj"], 2, "base")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]
