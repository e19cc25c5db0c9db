"""Small models for the rollout tests, and their weights in the per-rank layout, cut by hand with plain torch: an oracle
that shares no code with the layouts of the package."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_rl.models import Architecture
from megatron_rl.models.architecture import MLA, Experts
from megatron_rl.reshard import Layout
from megatron_rl.reshard.layout import Shard
from megatron_rl.rollout import LocalEngine

_SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
    "attn_implementation": "eager",
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.8,
    "mscale_all_dim": 1.1,
    "original_max_position_embeddings": 32,
}
_EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
    "experts_implementation": "eager",
}
_LATENT = _EXPERTS | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SMALL, tie_word_embeddings=False),
    "llama3_rope": LlamaConfig(**_SMALL, tie_word_embeddings=False, rope_parameters=_LLAMA3),
    "qwen2": Qwen2Config(**_SMALL, tie_word_embeddings=True),
    "qwen2_windows": Qwen2Config(
        **_SMALL, tie_word_embeddings=True, use_sliding_window=True, sliding_window=9, layer_types=_ALTERNATING
    ),
    "qwen3": Qwen3Config(**_SMALL, head_dim=16, tie_word_embeddings=False),
    "mistral": MistralConfig(**_SMALL, sliding_window=9, tie_word_embeddings=False),
    "mixtral": MixtralConfig(
        **_SMALL | {"intermediate_size": 24},
        num_local_experts=6,
        num_experts_per_tok=2,
        sliding_window=None,
        tie_word_embeddings=False,
        experts_implementation="eager",
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **_SMALL,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[0],
        tie_word_embeddings=False,
        experts_implementation="eager",
    ),
    "glm4_moe": Glm4MoeConfig(**_SMALL | _EXPERTS, head_dim=16, attention_bias=True, use_qk_norm=True),
    "deepseek_v3": DeepseekV3Config(**_SMALL | _LATENT, rope_parameters=_YARN, rms_norm_eps=1e-5),
    "moonlight": DeepseekV3Config(
        **_SMALL | _LATENT | {"q_lora_rank": None, "v_head_dim": 24, "n_group": 1, "topk_group": 1}
    ),
    "deepseek_v2": DeepseekV2Config(**_SMALL | _LATENT, rope_parameters=_YARN, topk_method="group_limited_greedy"),
    "qwen3_moe": Qwen3MoeConfig(
        **_SMALL,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        experts_implementation="eager",
    ),
}


def random_model(name: str, seed: int = 0) -> PreTrainedModel:
    """A Hugging Face model whose weights are large enough for peaked, varied distributions."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(torch.randn_like(buffer) * 0.3)
    return model


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The record, filled by hand from a Hugging Face config."""
    rope = dict(config.rope_parameters)
    theta, fraction = rope.pop("rope_theta"), rope.pop("partial_rotary_factor", 1.0)
    experts = None
    if config.model_type == "qwen3_moe":
        experts = Experts(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size)
    if config.model_type == "qwen2_moe":
        sizes = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
        shared = {"shared_ffn": config.shared_expert_intermediate_size, "shared_gate": True}
        experts = Experts(*sizes, normalize_weights=False, dense_layers=tuple(config.mlp_only_layers), **shared)
    if config.model_type.startswith(("glm4", "deepseek")):
        sizes = config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size
        groups = {"num_groups": config.n_group, "chosen_groups": config.topk_group, "scaling": 1.5}
        routing = {"scoring": "sigmoid", "correction_bias": True}
        if config.model_type == "deepseek_v2":
            routing = {"group_scored_by": 1, "normalize_weights": False}
        experts = Experts(*sizes, shared_ffn=48, dense_layers=(0,), **groups, **routing)
    mla = None
    if config.model_type.startswith("deepseek"):
        mla = MLA(
            config.q_lora_rank,
            config.kv_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
    if config.model_type == "mixtral":
        experts = Experts(config.num_local_experts, config.num_experts_per_tok, config.intermediate_size)
    return Architecture(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.qk_head_dim
        if mla
        else getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        qkv_bias=config.model_type.startswith(("qwen2", "glm4")),
        qk_norm=config.model_type.startswith(("qwen3", "glm4")),
        norm_eps=config.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=() if rope["rope_type"] == "default" else tuple(sorted(rope.items())),
        rotary_fraction=fraction,
        max_positions=config.max_position_embeddings,
        experts=experts,
        mla=mla,
        window=getattr(config, "sliding_window", None) or None,
        full_layers=(1,) if config.model_type == "qwen2" and config.sliding_window else (),
    )


@dataclass
class Cutter:
    """Cuts a Hugging Face state dict into one rank's tensors."""

    architecture: Architecture
    state: dict[str, Tensor]
    tp: int = 1
    rank: int = 0
    expert_parallel: bool = False
    out: dict[str, Tensor] = field(default_factory=dict)

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.tp)[self.rank]

    def cols(self, tensor: Tensor) -> Tensor:
        return tensor.chunk(self.tp, 1)[self.rank]

    def heads(self, tensor: Tensor, count: int) -> Tensor:
        by_head = tensor.unflatten(0, (count, -1))
        if self.tp > count:
            return by_head[self.rank * count // self.tp]
        return by_head.chunk(self.tp)[self.rank].flatten(0, 1)

    def vocabulary(self, tensor: Tensor) -> Tensor:
        padded = -(-len(tensor) // 64) * 64
        if padded % self.tp:
            padded = -(-len(tensor) // (64 * self.tp)) * 64 * self.tp
        return self.rows(torch.cat([tensor, tensor.new_zeros(padded - len(tensor), tensor.shape[1])]))

    def cut(self) -> dict[str, Tensor]:
        self.out["model.embed_tokens.weight"] = self.vocabulary(self.state["model.embed_tokens.weight"])
        if not self.architecture.tied:
            self.out["lm_head.weight"] = self.vocabulary(self.state["lm_head.weight"])
        self.out["model.norm.weight"] = self.state["model.norm.weight"]
        for layer in range(self.architecture.num_layers):
            self._layer(f"model.layers.{layer}.")
        return {name: tensor.detach().clone().contiguous() for name, tensor in self.out.items()}

    def _layer(self, prefix: str) -> None:
        size, state = self.architecture, self.state
        if size.mla is not None:
            self._latent(prefix + "self_attn.")
        for suffix in () if size.mla else ("weight", "bias") if size.qkv_bias else ("weight",):
            self.out[f"{prefix}self_attn.qkv_proj.{suffix}"] = torch.cat(
                [
                    self.heads(state[f"{prefix}self_attn.{part}_proj.{suffix}"], count)
                    for part, count in (("q", size.num_heads), ("k", size.num_kv_heads), ("v", size.num_kv_heads))
                ]
            )
        for norm in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
            if f"{prefix}{norm}.weight" in state:
                self.out[f"{prefix}{norm}.weight"] = state[f"{prefix}{norm}.weight"]
        self.out[prefix + "self_attn.o_proj.weight"] = self.cols(state[prefix + "self_attn.o_proj.weight"])
        layer = int(prefix.split(".")[2])
        if size.experts is None or layer in size.experts.dense_layers:
            parts = [self.rows(state[f"{prefix}mlp.{part}_proj.weight"]) for part in ("gate", "up")]
            self.out[prefix + "mlp.gate_up_proj.weight"] = torch.cat(parts)
            self.out[prefix + "mlp.down_proj.weight"] = self.cols(state[prefix + "mlp.down_proj.weight"])
        else:
            block = "block_sparse_moe." if self.architecture.family == "mixtral" else "mlp."
            self._experts(prefix + "mlp.", prefix + block)

    def _latent(self, prefix: str) -> None:
        state, down = self.state, self.state[prefix + "kv_a_proj_with_mqa.weight"]
        for name in ("kv_a_layernorm", "q_a_layernorm"):
            if f"{prefix}{name}.weight" in state:
                self.out[f"{prefix}{name}.weight"] = state[f"{prefix}{name}.weight"]
        for name in ("kv_b_proj", "q_b_proj", "q_proj"):
            if f"{prefix}{name}.weight" in state:
                self.out[f"{prefix}{name}.weight"] = self.rows(state[f"{prefix}{name}.weight"])
        if self.architecture.mla.q_rank is None:
            self.out[prefix + "kv_a_proj_with_mqa.weight"] = down
        else:
            both = torch.cat([state[prefix + "q_a_proj.weight"], down])
            self.out[prefix + "fused_qkv_a_proj_with_mqa.weight"] = both

    def _shared(self, prefix: str) -> None:
        if self.architecture.experts.correction_bias:
            name = prefix + "gate.e_score_correction_bias"
            self.out[name] = self.state[name]
        if self.architecture.experts.shared_gate:
            self.out[prefix + "shared_expert_gate.weight"] = self.state[prefix + "shared_expert_gate.weight"]
        prefix += "shared_expert." if self.architecture.family == "qwen2_moe" else "shared_experts."
        parts = [self.rows(self.state[f"{prefix}{part}_proj.weight"]) for part in ("gate", "up")]
        self.out[prefix + "gate_up_proj.weight"] = torch.cat(parts)
        self.out[prefix + "down_proj.weight"] = self.cols(self.state[prefix + "down_proj.weight"])

    def _experts(self, module: str, prefix: str) -> None:
        if self.architecture.experts.shared_ffn:
            self._shared(prefix)
        self.out[prefix + "gate.weight"] = self.state[module + "gate.weight"]
        gate_up, down = self.state[module + "experts.gate_up_proj"], self.state[module + "experts.down_proj"]
        if self.expert_parallel:
            w13, w2 = self.rows(gate_up), self.rows(down)
        else:
            halves = [half.chunk(self.tp, 1)[self.rank] for half in gate_up.chunk(2, 1)]
            w13, w2 = torch.cat(halves, 1), down.chunk(self.tp, 2)[self.rank]
        self.out[prefix + "experts.w13_weight"], self.out[prefix + "experts.w2_weight"] = w13, w2


def layout_of(shards: dict[str, Tensor], ranks: int = 1) -> Layout:
    """A layout with these shapes on every rank; the local engine reads nothing else of it."""
    emitted = tuple(Shard(name, tuple(tensor.shape), ()) for name, tensor in shards.items())
    return Layout("by hand", dict.fromkeys(range(ranks), 0), lambda replica: emitted)


def local_engine(model: PreTrainedModel, version: int = 1, **options: object) -> LocalEngine:
    """A loaded engine over ``model`` on this rank alone."""
    architecture = architecture_of(model.config)
    shards = Cutter(architecture, model.state_dict()).cut()
    engine = LocalEngine(architecture, layout_of(shards), **options)  # type: ignore[arg-type]
    engine.load_shards(shards, version)
    return engine


def reference_logprobs(
    model: PreTrainedModel, prompt: list[int], tokens: list[int], temperature: float = 1.0
) -> Tensor:
    """Log-probabilities of ``tokens`` after ``prompt`` by one full forward of transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0].float() / temperature
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
