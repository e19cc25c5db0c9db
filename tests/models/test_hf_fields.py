"""Damaged config.json, tokenizer and generation files: one ConfigError with the file's path, whatever is in them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models.oracle import ALL, LLAMA
from models.test_tokenizer import tokenizer as word_tokenizer

from megatron_rl.config import ConfigError
from megatron_rl.engines.megatron.model.builder import transformer_config
from megatron_rl.engines.megatron.model.rope import inverse_frequencies
from megatron_rl.models.hf_config import architecture_from_hf, hf_config_from, read_generation, read_hf_config
from megatron_rl.models.hf_fields import HFFields
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.parallel import ParallelSizes

LINEAR = {"rope_theta": 1e4, "rope_type": "linear"}
WRONG: list[tuple[str, Any]] = [
    ("num_hidden_layers", 10**12),
    ("num_hidden_layers", 10**400),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 2.0),
    ("num_hidden_layers", True),
    ("hidden_size", 2**31),
    ("hidden_size", "many"),
    ("rope_scaling", [1]),
    ("rope_scaling", "linear"),
    ("rope_scaling", {"rope_type": 5}),
    ("rope_scaling", LINEAR | {"factor": -1}),
    ("rope_parameters", 5),
    ("rope_parameters", {"rope_theta": "a", "rope_type": "default"}),
    ("rope_parameters", {"rope_theta": 0, "rope_type": "default"}),
    ("rope_parameters", {"rope_theta": 10**30, "rope_type": "default"}),
    ("rope_parameters", LINEAR | {"factor": "2"}),
    ("rope_parameters", LINEAR | {"rope_type": ["linear"]}),
    ("rope_theta", float("nan")),
    ("eos_token_id", "</s>"),
    ("eos_token_id", -5),
    ("eos_token_id", [2, "x"]),
    ("eos_token_id", True),
    ("pad_token_id", 2.5),
    ("hidden_act", 5),
    ("hidden_act", ["silu"]),
    ("dtype", "nonsense"),
    ("dtype", 5),
    ("torch_dtype", "int8"),
    ("torch_dtype", "nn"),
    ("torch_dtype", ["float32"]),
    ("architectures", "LlamaForCausalLM"),
    ("architectures", [5]),
    ("rms_norm_eps", "1e-5"),
    ("rms_norm_eps", -1),
    ("rms_norm_eps", 1e300),
    ("tie_word_embeddings", "true"),
    ("attention_bias", 2),
    ("sliding_window", "x"),
    ("id2label", ["a"]),
    ("num_labels", -1),
]
DAMAGED = {
    "nothing": b"",
    "half": b'{"a": 1',
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "deep": b"[" * 100_000,
    "5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "bytes": bytes(range(128, 256)),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_config_from(LLAMA, dtype="float32").save_pretrained(tmp_path)
    word_tokenizer(eos_token="</s>", pad_token="<pad>").save_pretrained(tmp_path)
    return tmp_path


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(read: Callable[[Path], object], folder: Path, path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{name}-{i}" for i, (name, _) in enumerate(WRONG)])
def test_a_field_of_a_wrong_kind_is_named(folder: Path, field: str, value: Any) -> None:
    change(folder / "config.json", **{field: value})
    assert field in refused(read_hf_config, folder, folder / "config.json")


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_named(folder: Path, what: str) -> None:
    for name, read in {"config.json": read_hf_config, "generation_config.json": read_generation}.items():
        kept = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
        (folder / name).write_bytes(DAMAGED[what])
        refused(read, folder, folder / name)
        (folder / name).write_bytes(kept)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(DAMAGED[what])
        assert "no tokenizer could be loaded" in refused(load_tokenizer, folder, folder)
        (folder / name).write_bytes(kept)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_max_length", "x"),
        ("model_max_length", [1]),
        ("chat_template", 5),
        ("eos_token", 5),
        ("pad_token", ["x"]),
    ],
)
def test_a_field_of_the_tokenizer_of_a_wrong_kind_is_one_line(folder: Path, field: str, value: Any) -> None:
    change(folder / "tokenizer_config.json", **{field: value})
    assert "no tokenizer could be loaded" in refused(load_tokenizer, folder, folder)


def test_a_model_without_a_type_and_one_of_another_type_are_named(folder: Path) -> None:
    change(folder / "config.json", model_type="gtp2")
    assert "is not supported" in refused(read_hf_config, folder, folder / "config.json")
    for model_type in (None, 5, ["llama"], {}):
        change(folder / "config.json", model_type=model_type)
        assert "nothing says what model this is" in refused(read_hf_config, folder, folder / "config.json")


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.family)
def test_what_transformers_writes_is_right(architecture, tmp_path: Path) -> None:
    hf_config_from(architecture, dtype="bfloat16").save_pretrained(tmp_path)
    read_hf_config(tmp_path)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**3), 10**3)
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "x", "silu", "linear", "float16", "\ud800", "0"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["rope_type", "factor", "a"]), inner),
    max_leaves=4,
)
FIELDS = sorted({*HFFields.model_fields, "layer_types", "max_window_layers", "use_sliding_window", "pretraining_tp"})


@given(field=st.sampled_from(FIELDS), value=ANYTHING)
@example("rope_parameters", {"rope_type": "linear"})
@example("num_key_value_heads", 3)
@example("layer_types", ["full_attention"])
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_whatever_a_config_says_it_is_read_or_refused(folder: Path, field: str, value: Any) -> None:
    path = folder / "config.json"
    kept = path.read_text()
    change(path, **{field: value})
    with contextlib.suppress(ConfigError):
        architecture = architecture_from_hf(read_hf_config(folder))
        transformer_config(architecture, ParallelSizes())
        inverse_frequencies(architecture)
    path.write_text(kept)
