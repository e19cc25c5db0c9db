"""`ServerLayout`: what a server must have been started with for its parameters to be those of a rollout layout.

SGLang stores the same parameters, often under the same names and shapes, in another order or number format when it is
started with certain options. What a running server says of itself (/server_info) is compared before any byte moves.
Options and their values: `sglang.srt.server_args` of 0.5.23; one that a server does not report counts as its default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rl.config import ConfigError
from megatron_rl.reshard import Layout

EXPERTS, BIASES = ".experts.w13_weight", ".experts.w13_weight_bias"
# Option -> (values that leave parameters as they are, what others do). None stands for an option that is not set.
OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "pp_size": ((1, None), "cuts the layers over servers' ranks"),
    "dp_size": ((1, None), "puts several copies behind one address"),
    "attn_dp_size": ((1, None), "cuts attention over fewer ranks"),
    "enable_dp_attention": ((False, None), "cuts attention over fewer ranks"),
    "attn_cp_size": ((1, None), "cuts attention over fewer ranks"),
    "moe_dp_size": ((1, None), "cuts experts over fewer ranks"),
    "moe_dense_tp_size": ((None,), "cuts dense layers over fewer ranks"),
    "quantization": ((None, "", "unquant"), "stores weights in another number format"),
    "torchao_config": ((None, ""), "stores weights in another number format"),
    "cpu_offload_gb": ((0, None), "keeps some weights apart from the others"),
    "weight_cache_mode": (("off", None), "shares weights with other servers, which refuse updates"),
    "speculative_algorithm": ((None, "", "NGRAM"), "adds a draft model, which would be written too"),
}
MOE_OPTIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "moe_runner_backend": (("auto", "triton", "deep_gemm", None), "may store gate and up in another order"),
    "moe_a2a_backend": (("none", None), "may place experts otherwise"),
    "ep_num_redundant_experts": ((0, None), "holds some experts several times"),
    "enable_eplb": ((False, None), "moves experts between ranks"),
    "init_expert_location": (("trivial", None), "places experts in an order of its own"),
}


@dataclass(frozen=True, slots=True)
class ServerLayout:
    """The sizes that a server must have."""

    tp: int
    ep: int
    has_experts: bool
    dtype: str  # "bfloat16"
    of_files: bool = False  # experts lie as in files, as gpt-oss's do with one backend; others transpose them

    @classmethod
    def of(cls, layout: Layout, dtype: torch.dtype) -> ServerLayout:
        """Read off a `rollout_layout`."""
        replicas = list(layout.replicas)
        first = next((shard for shard in layout.shards_of(replicas[0]) if shard.name.endswith(EXPERTS)), None)
        name = str(dtype).removeprefix("torch.")
        if first is None:
            return cls(len(replicas), 1, False, name)
        held = [shard for replica in replicas for shard in layout.shards_of(replica) if shard.name == first.name]
        everywhere = {span.tensor for shard in held for span in shard.spans}
        of_files = any(shard.name.endswith(BIASES) for shard in layout.shards_of(replicas[0]))
        return cls(len(replicas), len(everywhere) // len({span.tensor for span in first.spans}), True, name, of_files)

    def differences(self, info: Mapping[str, Any]) -> list[str]:
        """What makes the server with /server_info ``info`` hold its parameters otherwise; empty when nothing does."""
        rules = OPTIONS | (MOE_OPTIONS if self.has_experts else {})
        if self.of_files:
            rules |= {"moe_runner_backend": (("triton_kernel",), "holds the experts transposed")}
        found = [
            f"{name}={info.get(name)!r} (it {effect}; expected {values[0]!r})"
            for name, (values, effect) in rules.items()
            if info.get(name) not in values
        ]
        if self.has_experts and info.get("ep_size", 1) != self.ep:
            found.append(f"ep_size={info.get('ep_size')!r} (expected {self.ep})")
        if info.get("dtype") in ("bfloat16", "float16", "float32") and info["dtype"] != self.dtype:
            found.append(f"dtype={info['dtype']!r} (expected {self.dtype!r})")
        return found

    def check(self, info: Mapping[str, Any], url: str, runs_loader: bool) -> None:
        """Refuse a server whose weights would be written wrongly.

        Args:
            runs_loader: weights go through the server's own loader, which places them as it needs.

        Raises:
            ConfigError: another tensor parallelism, or other options that change the layout; the message names them.
        """
        if info.get("tp_size") != self.tp:
            raise ConfigError(
                f"the server at {url} runs with tp={info.get('tp_size')}, expected {self.tp}: start it "
                f"with --tp {self.tp}, or set actor.rollout.tp"
            )
        found = [] if runs_loader else self.differences(info)
        if found:
            raise ConfigError(
                f"the server at {url} holds its weights in another layout than they are pushed in: {'; '.join(found)}. "
                f"Start it without, or choose actor.rollout.options.delivery=disk, which runs the server's own loader"
            )
