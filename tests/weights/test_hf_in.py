"""Weights from Hugging Face folders and models into rank-local tensors, and every way a folder can be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from models.oracle import ALL, LLAMA, QWEN2, megatron_by_hand
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_rl.config import ConfigError
from megatron_rl.models import Architecture, logical_tensors, megatron_layout
from megatron_rl.models.hf_config import hf_config_from
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard.layout import Span
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.hf_in import load_folder, model_source, read_architecture, resolve_folder
from megatron_rl.weights.opened_weights import open_weights
from megatron_rl.weights.source import SafetensorsFolder

GRID = RankGrid(ParallelSizes(tp=2, pp=2), 4)


def random_model(architecture: Architecture) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config_from(architecture, dtype="float32"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="module", params=ALL, ids=lambda a: a.family)
def saved(request, tmp_path_factory) -> tuple[Architecture, PreTrainedModel, Path]:
    """A random model, and its folder written by transformers in several files."""
    folder = tmp_path_factory.mktemp(request.param.family)
    model = random_model(request.param)
    model.save_pretrained(folder, max_shard_size="20KB")
    return request.param, model, folder


@pytest.fixture
def llama_folder(tmp_path) -> Path:
    random_model(LLAMA).save_pretrained(tmp_path)
    return tmp_path


def read_files(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_the_logical_tensors_are_those_that_transformers_writes(saved) -> None:
    architecture, _, folder = saved
    assert {k: tuple(v.shape) for k, v in read_files(folder).items()} == logical_tensors(architecture)


def test_a_folder_in_several_files_fills_each_rank_as_slicing_by_hand_does(saved) -> None:
    architecture, _, folder = saved
    assert (folder / "model.safetensors.index.json").is_file()
    layout, full = megatron_layout(architecture, GRID, 64), read_files(folder)
    for rank in range(4):
        tensors = empty_tensors(layout, rank, torch.float32)
        load_folder(folder, layout, rank, tensors)
        expected = megatron_by_hand(architecture, full, GRID, rank, 64)
        assert sorted(tensors) == sorted(expected)
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_model_in_memory_fills_the_same_as_its_folder(saved) -> None:
    architecture, model, folder = saved
    found, source = model_source(model)
    assert found == architecture == read_architecture(folder)
    layout = megatron_layout(architecture, GRID, 64)
    for rank in range(4):
        from_memory, from_folder = (empty_tensors(layout, rank, torch.float32) for _ in range(2))
        fill(layout, rank, from_memory, source)
        load_folder(folder, layout, rank, from_folder)
        assert all(torch.equal(from_memory[name], from_folder[name]) for name in from_folder)


def test_values_are_cast_to_the_dtype_of_the_local_tensor(llama_folder) -> None:
    layout = megatron_layout(LLAMA, GRID, 64)
    tensors = empty_tensors(layout, 0, torch.bfloat16)
    load_folder(llama_folder, layout, 0, tensors)
    norm = load_file(llama_folder / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    assert torch.equal(tensors["decoder.layers.0.input_layernorm.weight"], norm.bfloat16())


def test_a_rank_reads_no_element_that_it_does_not_hold(llama_folder) -> None:
    class Counting(SafetensorsFolder):
        num_read = 0

        def read(self, span: Span) -> torch.Tensor:
            self.num_read += span.numel
            return super().read(span)

    layout = megatron_layout(LLAMA, GRID, 64)
    with Counting(llama_folder) as source:
        tensors = empty_tensors(layout, 0, torch.float32)
        fill(layout, 0, tensors, source)
    padding = 0  # rank 0 holds rows 0..31 of 50: no padding
    assert source.num_read == sum(t.numel() for t in tensors.values()) - padding


def test_tensors_outside_of_the_layout_stay_as_they_are(llama_folder) -> None:
    layout = megatron_layout(LLAMA, GRID, 64, output_layer=False)
    tensors = empty_tensors(layout, 2, torch.float32) | {"output_layer.weight": torch.full((1, 24), 7.0)}
    load_folder(llama_folder, layout, 2, tensors)
    assert bool((tensors["output_layer.weight"] == 7).all())


def test_a_tied_folder_may_also_store_its_head(tmp_path, caplog) -> None:
    model = random_model(QWEN2)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors")
    layout = megatron_layout(QWEN2, GRID, 64)
    local = empty_tensors(layout, 2, torch.float32)
    load_folder(tmp_path, layout, 2, local)
    assert torch.equal(local["output_layer.weight"], embedding[:32])
    assert not caplog.records


def test_a_tied_folder_with_another_head_is_refused(tmp_path) -> None:
    random_model(QWEN2).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[49, 23] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    layout = megatron_layout(QWEN2, GRID, 64)
    with pytest.raises(ConfigError, match=r"model\.safetensors: lm_head\.weight is not .*tie_word_embeddings"):
        load_folder(tmp_path, layout, 2, empty_tensors(layout, 2, torch.float32))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
    ],
)
@pytest.mark.parametrize("dim", [0, -1])
def test_a_tensor_larger_than_the_config_says_is_refused_on_every_rank_and_by_convert(tmp_path, name, dim) -> None:
    random_model(LLAMA).save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    shape = list(tensors[name].shape)
    tensors[name] = torch.cat([tensors[name], tensors[name].narrow(dim, 0, 1)], dim=dim)
    save_file(tensors, file)
    larger = list(tensors[name].shape)
    expected = re.escape(f"{file}: {name} has shape {larger}, but config.json describes {shape}")
    layout = megatron_layout(LLAMA, GRID, 64)
    for rank in range(4):
        with pytest.raises(ConfigError, match=expected):
            load_folder(tmp_path / "hf", layout, rank, empty_tensors(layout, rank, torch.float32))
    with pytest.raises(ConfigError, match=expected), open_weights(tmp_path / "hf"):
        pass


def test_a_model_with_a_forward_or_parameters_of_its_own_is_refused_by_name() -> None:
    model = random_model(LLAMA)

    class Scaled(type(model)):
        def forward(self, *arguments, **named):
            return super().forward(*arguments, **named)

    class Renamed(type(model)):
        pass

    config = model.config
    with pytest.raises(ConfigError, match="the model is a Scaled with a forward of its own"):
        model_source(Scaled(config))
    model_source(Renamed(config))
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp is a LlamaMLP with a forward"):
        model_source(model)
    larger = random_model(LLAMA)
    larger.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"2 tensors that a llama model does not have, first 'extra\.bias'"):
        model_source(larger)


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**12), ("hidden_size", "many"), ("vocab_size", -1), ("num_attention_heads", [4])],
)
def test_a_config_with_values_that_cannot_be_right_is_one_line(tmp_path, field, value) -> None:
    random_model(LLAMA).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ConfigError, match=re.escape(f"{path}: {field} = ")) as caught:
        read_architecture(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "[]", "\udcff"])
def test_damaged_json_files_are_one_line(tmp_path, text) -> None:
    for name, read in {"config.json": read_architecture, "model.safetensors.index.json": SafetensorsFolder}.items():
        (tmp_path / name).write_text(text, errors="surrogateescape")
        with pytest.raises(ConfigError, match=re.escape(name)) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


def test_an_index_names_files_of_its_folder_only(tmp_path) -> None:
    for entry in (3, "../other.safetensors", None, "", ".", "a\0b", "\ud800"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": entry}}))
        with pytest.raises(ConfigError, match="names no file of the folder"):
            SafetensorsFolder(tmp_path)


def load(folder: Path) -> None:
    layout = megatron_layout(LLAMA, GRID, 64)
    load_folder(folder, layout, 0, empty_tensors(layout, 0, torch.float32))


def test_a_missing_tensor_is_named(llama_folder) -> None:
    tensors = load_file(llama_folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, llama_folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lacks 1 of 39 tensors, first 'model.layers.2.mlp.up_proj.weight'"):
        load(llama_folder)


def test_a_missing_or_corrupt_file_is_named(tmp_path) -> None:
    random_model(LLAMA).save_pretrained(tmp_path, max_shard_size="20KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(ConfigError, match=f"{victim.name} is not a readable safetensors file"):
        load(tmp_path)
    victim.unlink()
    with pytest.raises(ConfigError, match=rf"{victim.name} does not exist, but the folder's index names it"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a safetensors index"):
        load(tmp_path)


def test_pickled_weights_are_refused(llama_folder) -> None:
    (llama_folder / "model.safetensors").rename(llama_folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin but no safetensors"):
        load(llama_folder)


def test_weights_of_another_size_than_the_config_are_refused(llama_folder) -> None:
    config = json.loads((llama_folder / "config.json").read_text()) | {"vocab_size": 60}
    (llama_folder / "config.json").write_text(json.dumps(config))
    layout = megatron_layout(read_architecture(llama_folder), GRID, 64)
    with pytest.raises(ConfigError, match=r"embed_tokens.weight has shape \[50, 24\]"):
        load_folder(llama_folder, layout, 1, empty_tensors(layout, 1, torch.float32))


def test_a_model_of_another_shape_than_the_layout_is_refused(llama_folder) -> None:
    layout = megatron_layout(LLAMA, GRID, 64)
    tensors = empty_tensors(layout, 0, torch.float32)
    del tensors["decoder.layers.1.mlp.linear_fc2.weight"]
    with pytest.raises(ConfigError, match=r"'decoder.layers.1.mlp.linear_fc2.weight' on rank 0"):
        load_folder(llama_folder, layout, 0, tensors)


def test_a_path_that_does_not_exist_is_an_error_at_once() -> None:
    with pytest.raises(ConfigError, match="neither a folder nor a model id"):
        resolve_folder("/no/such/folder")


@pytest.mark.parametrize("kind", [torch.int32, torch.float64, torch.float8_e4m3fn], ids=str)
def test_a_tensor_whose_numbers_are_none_of_ours_is_refused(tmp_path, kind) -> None:
    """Eight-bit numbers need scales, which are in tensors of their own: read plainly they are other weights."""
    random_model(LLAMA).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(kind)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=rf"model\.safetensors: {name} is stored as .*expected one of F32, BF16, F16"):
        load(tmp_path)
