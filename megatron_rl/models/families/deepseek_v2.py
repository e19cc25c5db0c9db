"""DeepSeek-V2 and V2-Lite: as V3, but routers take a softmax, have no correction bias and score a group by its best
expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from megatron_rl.config import ConfigError
from megatron_rl.models.architecture import Architecture
from megatron_rl.models.families.deepseek_v3 import DeepseekV3
from megatron_rl.models.family import FAMILIES

GREEDY, GROUPED = "greedy", "group_limited_greedy"


@FAMILIES.register("deepseek_v2")
class DeepseekV2(DeepseekV3):
    """Softmax routers, with groups or without."""

    routers: ClassVar[Mapping[str, Any]] = {"scoring_func": "softmax", "moe_layer_freq": 1}
    exported: ClassVar[Mapping[str, Any]] = {}

    def interleaved(self, config: Mapping[str, Any]) -> bool:
        return True

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        unsupported = {
            "norm_topk_prob": bool(config["norm_topk_prob"]),  # `transformers` ignores it
            "topk_method": config["topk_method"] not in (GREEDY, GROUPED),
        }
        for key, refused in unsupported.items():
            if refused:
                raise ConfigError(f"{self.model_type} config has {key}={config[key]!r}, which no decoder here computes")

    def routing(self, config: Mapping[str, Any]) -> dict[str, Any]:
        plain = {"scoring": "softmax", "correction_bias": False}
        grouped = config["topk_method"] == GROUPED
        groups = {"group_scored_by": 1} if grouped else {"num_groups": 1, "chosen_groups": 1}
        return super().routing(config) | plain | groups

    def config_fields(self, architecture: Architecture) -> dict[str, Any]:
        fields = super().config_fields(architecture)
        del fields["rope_interleave"]
        assert architecture.experts is not None
        grouped = architecture.experts.num_groups > 1
        groups = {} if grouped else {"n_group": None, "topk_group": None}
        return fields | groups | {"topk_method": GROUPED if grouped else GREEDY}
