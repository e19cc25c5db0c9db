"""`Rotary` against transformers' own rotary parameters, for each scaling."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rl.config import ConfigError
from megatron_rl.models.components.position import Rotary, yarn_mscale
from megatron_rl.models.family import family_of, frozen_rope
from megatron_rl.models.hf_config import architecture_from_hf, hf_config_from

SIZES = {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 4096}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 512}
LISTS = {
    part: {"short_factor": [1 + i / 50 for i in range(part)], "long_factor": [2 + i / 3 for i in range(part)]}
    for part in (48, 64)
}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": YARN,
    "yarn with bounds": YARN | {"beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn as DeepSeek has it": YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
    "yarn with a factor of attention": YARN | {"attention_factor": 0.7},
    "longrope": LONG | LISTS[64],
    "longrope with a factor": LONG | LISTS[64] | {"factor": 3.0},
    "longrope of a part": LONG | LISTS[48] | {"partial_rotary_factor": 0.75},
}


def rotary_of(config: PretrainedConfig) -> Rotary:
    rope = dict(config.rope_parameters)
    theta, part = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", 1.0)
    return Rotary(int(128 * part), theta, frozen_rope(rope), config.max_position_embeddings)


@pytest.mark.parametrize("length", [1, 513])
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=list(SCALINGS))
def test_frequencies_and_amplitude_are_those_of_transformers(scaling: dict, length: int) -> None:
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 5e4, **scaling})
    theirs, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"), seq_len=length)
    rotary = rotary_of(config)
    torch.testing.assert_close(rotary.inverse_frequencies(length), theirs, rtol=1e-6, atol=0)
    assert rotary.amplitude == pytest.approx(factor, rel=1e-12)
    cos, sin = rotary.cos_sin(torch.tensor([0, 3]), length)
    torch.testing.assert_close(cos[1], (theirs * 3).cos() * factor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sin[1], (theirs * 3).sin() * factor, rtol=1e-5, atol=1e-6)
    assert torch.equal(sin[0], torch.zeros_like(sin[0]))


def test_only_longrope_has_other_frequencies_for_long_sequences() -> None:
    long, yarn = (Rotary(128, 1e4, frozen_rope(SCALINGS[name]), 4096) for name in ("longrope", "yarn"))
    assert (long.switch, yarn.switch) == (512, None)
    assert torch.equal(long.inverse_frequencies(512), long.inverse_frequencies(1))
    assert not torch.equal(long.inverse_frequencies(513), long.inverse_frequencies(512))
    assert torch.equal(yarn.inverse_frequencies(5000), yarn.inverse_frequencies(1))


def test_mscale_is_one_where_nothing_is_stretched() -> None:
    assert yarn_mscale(1.0) == yarn_mscale(0.5, 3.0) == 1.0
    assert yarn_mscale(math.e, 2.0) == pytest.approx(1.2)


def test_lists_of_another_length_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs 32 numbers in 'short_factor', got \(1.0, 1.02"):
        Rotary(64, 1e4, frozen_rope(SCALINGS["longrope"]), 4096).inverse_frequencies()


PHI4 = {"rope_theta": 1e4, "partial_rotary_factor": 0.75, **LONG, **LISTS[48]}


@pytest.mark.parametrize("rope", [{"rope_theta": 1e4}, PHI4], ids=["phi3", "phi4-mini"])
def test_phi3_configs_survive_both_ways(rope: dict) -> None:
    original = {"original_max_position_embeddings": 512}
    config = Phi3Config(**SIZES, **original, intermediate_size=64, rope_parameters=dict(rope))
    architecture = architecture_from_hf(config)
    assert architecture.rotary_fraction == rope.get("partial_rotary_factor", 1.0)
    written = hf_config_from(architecture)
    assert written.rope_parameters == config.rope_parameters
    assert architecture_from_hf(written) == architecture
    rotary = family_of("phi3").describe(architecture).layers[0].attention.rotary
    assert rotary.dim == int(128 * architecture.rotary_fraction)
