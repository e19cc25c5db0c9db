"""A PEFT folder from the parts of all ranks: whole matrices, complete or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models.oracle import LLAMA
from safetensors.torch import load_file
from torch import Tensor

from megatron_rl.config import ConfigError
from megatron_rl.models import megatron_layout
from megatron_rl.models.peft_names import ModulePlace, module_places
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.weights.peft_out import AdapterPart, Whole, assembled, parts_of, write_peft


@dataclass
class Held:
    """What a rank has of an adapter."""

    a: Tensor
    b: Tensor
    row_parallel: bool

    def matrices(self, tensor: str | None = None) -> tuple[Tensor, Tensor, float]:
        return self.a, self.b, 2.0


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_parts_of_any_tensor_parallel_size_give_the_same_matrices(tp: int) -> None:
    """8 query heads and 4 key/value heads in groups of [q q k v], 4 rows each; TP8 cuts groups in half."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 24, generator=generator), torch.randn(64, 2, generator=generator)
    down_a, down_b = torch.randn(2, 32, generator=generator), torch.randn(24, 2, generator=generator)
    layout = megatron_layout(LLAMA, RankGrid(ParallelSizes(tp=tp), tp), 64)
    places = module_places(LLAMA)
    parts: list[AdapterPart] = []
    for rank in range(tp):
        shards = {shard.name: shard for shard in layout.shards(rank)}
        qkv = shards["decoder.layers.1.self_attention.linear_qkv.weight"]
        parts += parts_of(qkv, Held(a, b.chunk(tp)[rank], row_parallel=False), places)
        fc2 = shards["decoder.layers.1.mlp.linear_fc2.weight"]
        parts += parts_of(fc2, Held(down_a.chunk(tp, 1)[rank], down_b, row_parallel=True), places)
    found = assembled(parts, places)
    layer, groups = "model.layers.1.", b.view(4, 4, 4, 2)
    for letter, heads in (("q", groups[:, :2]), ("k", groups[:, 2]), ("v", groups[:, 3])):
        one = found[f"{layer}self_attn.{letter}_proj.weight"]
        assert torch.equal(one.a, a)
        assert torch.equal(one.b, heads.reshape(-1, 2))
    down = found[f"{layer}mlp.down_proj.weight"]
    assert torch.equal(down.a, down_a)
    assert torch.equal(down.b, down_b)
    assert (len(found), down.rank, down.factor) == (4, 2, 2.0)


def test_a_missing_part_is_no_matrix() -> None:
    whole = ModulePlace("x", (4, 2), 0)
    with pytest.raises(AssertionError, match="x: A has holes"):
        assembled([AdapterPart("x", "A", (2, 0), torch.ones(2, 2), 1.0)], {"x": whole})


def adapter(module: str, value: float, rank: int = 2, factor: float = 2.0) -> dict[str, Whole]:
    name = f"model.layers.0.mlp.{module}.weight"
    return {name: Whole(ModulePlace(name, (4, 3), 0), torch.full((rank, 3), value), torch.ones(4, rank), factor)}


def test_an_existing_folder_stays_unless_it_may_be_replaced(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    folder = tmp_path / "adapters"
    write_peft(folder, adapter("up_proj", 1.0), 0.0, "base", mixture=False, overwrite=False)
    with pytest.raises(ConfigError, match="exists: give another folder"):
        write_peft(folder, adapter("up_proj", 0.0), 0.0, "base", mixture=False, overwrite=False)
    assert load_file(folder / "adapter_model.safetensors")[name].all()
    write_peft(folder, adapter("up_proj", 0.0), 0.0, "base", mixture=False, overwrite=True)
    assert not load_file(folder / "adapter_model.safetensors")[name].any()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["target_modules"], config["r"], config["base_model_name_or_path"]) == (["up_proj"], 2, "base")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


def test_ranks_and_factors_that_differ_are_patterns(tmp_path: Path) -> None:
    several = adapter("up_proj", 1.0) | adapter("gate_proj", 1.0) | adapter("down_proj", 1.0, rank=3, factor=0.5)
    write_peft(tmp_path / "adapters", several, 0.1, "", mixture=False, overwrite=False)
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4.0, 0.1)
    key = r"model\.layers\.0\.mlp\.down_proj"
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({key: 3}, {key: 1.5})
