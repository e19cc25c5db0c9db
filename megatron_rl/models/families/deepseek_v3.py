"""DeepSeek-V3 and R1, Moonlight, and every model published under their model type: latent attention and experts that
sigmoid routers choose within groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import MLA, Architecture
from megatron_rl.models.components.mla import LatentAttention
from megatron_rl.models.components.position import Rotary
from megatron_rl.models.description import LayerDescription
from megatron_rl.models.families.deepseek_experts import DeepseekExperts
from megatron_rl.models.family import FAMILIES

# Field of MLA -> key of config.json.
LATENT_KEYS = {
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
}


@FAMILIES.register("deepseek_v3")
class DeepseekV3(DeepseekExperts):
    """Latent attention; queries have a latent of their own, or none."""

    published_code = "modeling_deepseek."
    # What SGLang and the published code ask for, beside what `transformers` does.
    routers: ClassVar[Mapping[str, Any]] = {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
    }

    def architecture(self, config: Mapping[str, Any]) -> Architecture:
        mla = MLA(**{ours: config[key] for ours, key in LATENT_KEYS.items()}, interleaved=self.interleaved(config))
        return replace(super().architecture(config), head_dim=mla.nope_dim + mla.rope_dim, mla=mla)

    def interleaved(self, config: Mapping[str, Any]) -> bool:
        """Whether channels that turn together are neighbours."""
        return bool(config["rope_interleave"])

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        heads = config["num_attention_heads"]
        expected = dict(self.routers) | {"num_key_value_heads": heads, "ep_size": 1}
        for key, value in expected.items():
            if config.get(key, value) not in (value, None):
                raise ConfigError(f"{self.model_type} config has {key}={config[key]!r}; supported is {value!r}")

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        mla = architecture.mla
        if mla is None:
            raise ConfigError(f"a {self.model_type} has latent attention")
        fields = super().config_fields(architecture)
        del fields["head_dim"]  # `transformers` sets it to the part that turns
        fields |= {key: getattr(mla, ours) for ours, key in LATENT_KEYS.items()}
        return fields | {"rope_interleave": mla.interleaved, "attention_bias": False} | dict(self.routers)

    def layer(self, a: Architecture, index: int) -> LayerDescription:
        assert a.mla is not None
        return replace(super().layer(a, index), recomputed=self.attention(a, index).recomputed())

    def attention(self, a: Architecture, index: int) -> LatentAttention:
        assert a.mla is not None
        return LatentAttention(a.hidden, a.num_heads, a.mla, self.rotary(a, index))

    def rotary(self, a: Architecture, index: int) -> Rotary:
        assert a.mla is not None
        return replace(super().rotary(a, index), dim=a.mla.rope_dim)
