"""Folders whose parts contradict each other, or are not all there: one line that names file, tensor and shapes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, seeded_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from megatron_rl.config import ConfigError
from megatron_rl.engines.conversion import convert
from megatron_rl.models.hf_config import best_architecture, read_hf_config
from megatron_rl.parallel import ParallelSizes
from megatron_rl.weights.hf_in import check_folder
from megatron_rl.weights.proof import prove_folder
from megatron_rl.weights.source import SafetensorsFolder


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    seeded_model(FAMILIES["llama"]).save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    (tmp_path / "hf").mkdir()
    for path in good.iterdir():
        (tmp_path / "hf" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "hf"


def refused(folder: Path, *said: str) -> None:
    """By `convert`, which writes nothing, and by what `train --check` and training call."""

    def check() -> None:
        with SafetensorsFolder(folder) as source:
            check_folder(source, best_architecture(read_hf_config(folder)))

    for action in (lambda: convert(folder, folder.parent / "out", "megatron"), check):
        with pytest.raises(ConfigError) as caught:
            action()
        assert "\n" not in str(caught.value)
        assert all(re.search(text, str(caught.value)) for text in said), str(caught.value)
    assert {path.name for path in folder.parent.iterdir()} == {"hf"}


def set_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def test_files_without_their_index(folder) -> None:
    (folder / "model.safetensors.index.json").unlink()
    refused(
        folder, r"has 7 safetensors files, model-00001-of-00007\.safetensors first, but no model\.safetensors\.index"
    )


def test_layers_that_the_config_does_not_count(folder) -> None:
    set_config(folder, num_hidden_layers=3)
    refused(
        folder,
        r"model-0000\d-of-00007\.safetensors: model\.layers\.3\.input_layernorm\.weight \[64\]",
        r"num_hidden_layers=3: model\.layers\.3\.\* would be cut off",
    )


def test_layers_that_predict_several_tokens_are_refused_by_name_or_left_out(folder, caplog) -> None:
    """By `convert` and by the proof alike; training leaves them out."""
    names = ["model.layers.4.eh_proj.weight", "model.layers.4.enorm.weight"]
    save_file({name: torch.zeros(64) for name in names}, folder / "mtp.safetensors", {"format": "pt"})
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(names, "mtp.safetensors")
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"model\.layers\.4\.\* \(2 tensors\) .*--drop-mtp"):
        convert(folder, folder.parent / "out", "megatron")
    faults = prove_folder(folder, ParallelSizes(tp=2)).faults
    assert [(fault.kind, fault.name) for fault in faults] == [("unclaimed", "model.layers.4.*")]
    assert prove_folder(folder, ParallelSizes(tp=2), drop_mtp=True).faults == ()
    caplog.set_level("WARNING")
    with SafetensorsFolder(folder) as source:
        check_folder(source, best_architecture(read_hf_config(folder)))
    assert "model.layers.4.*, 2 tensors, predicts several tokens" in caplog.text
    convert(folder, folder.parent / "out", "hf", drop_mtp=True)
    with SafetensorsFolder(folder.parent / "out") as source:
        assert not set(names) & set(source.names())


def test_a_tensor_in_two_files(folder) -> None:
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second, {"format": "pt"})
    refused(folder, rf"{second.name} and {first.name} both hold {re.escape(name)} \(\[250, 64\] and \[250, 64\]\)")


@pytest.mark.parametrize("value", [None, 3])
def test_a_config_without_a_model_type(folder, value) -> None:
    set_config(folder, model_type=value)
    refused(folder, r"config\.json: model_type is (missing|3), so nothing says what model this is")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rope_parameters": {"rope_type": "banana", "rope_theta": 1e4}}, "rope_type 'banana'"),
        ({"hidden_act": "banana"}, "hidden_act='banana'"),
        ({"attention_dropout": "a"}, r"config\.json .*attention_dropout"),
    ],
)
def test_a_bad_value_of_the_config(folder, values, said) -> None:
    set_config(folder, **values)
    refused(folder, said)


@pytest.mark.parametrize(("name", "hint"), [("lama", "Did you mean 'llama'"), ("llama4", None), ("qwen3_next", None)])
def test_only_misspelled_names_are_corrected(folder, name, hint) -> None:
    """Llama 4 is another model than Llama."""
    set_config(folder, model_type=name)
    with pytest.raises(ConfigError, match=f"model type '{name}' is not supported") as caught:
        convert(folder, folder.parent / "out", "megatron")
    assert ("Did you mean" in str(caught.value)) == (hint is not None)


@pytest.mark.parametrize("kind", [dict, list])
def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(folder, kind) -> None:
    words = {f"word{i}": i for i in range(250)}
    model = {"type": "BPE", "vocab": words if kind is dict else [[word, 0.0] for word in words]}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({"model": model, "added_tokens": [{"id": 251, "content": "<extra>"}]}))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: the tokenizer has token ids up to 251, but .* 250 rows"):
        convert(folder, folder.parent / "out", "megatron")
    path.write_text(json.dumps({"model": model, "added_tokens": []}))
    convert(folder, folder.parent / "out", "hf")
    assert (folder.parent / "out" / "tokenizer.json").read_bytes() == path.read_bytes()


def test_files_of_a_bare_decoder_are_those_of_its_language_model(tmp_path) -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(bare, path, {"format": "pt"})
    with SafetensorsFolder(tmp_path) as source:
        check_folder(source, best_architecture(read_hf_config(tmp_path)))
    save_file(bare | {"wte.weight": torch.zeros(65, 32)}, path, {"format": "pt"})
    with SafetensorsFolder(tmp_path) as source, pytest.raises(ConfigError, match=r"has shape \[65, 32\]"):
        check_folder(source, best_architecture(read_hf_config(tmp_path)))
