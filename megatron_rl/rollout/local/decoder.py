"""`Decoder`: a functional pre-norm decoder over one rank's weights as SGLang names and lays them out.

It keeps references to the parameter storage, so weights written in place are used by the next call. `prefill` runs
whole prompts and fills the KV cache; `decode` adds one token to every running sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_rl.models import Architecture
from megatron_rl.ops.registry import choose
from megatron_rl.rollout.local.experts import ExpertLayer
from megatron_rl.rollout.local.kv_cache import KVCache
from megatron_rl.rollout.local.rotary import RotaryTable, rotate_
from megatron_rl.rollout.local.sharding import TensorParallel

# Tokens whose intermediate values, the widest of a layer, exist at once: long prompts take several rounds.
MLP_TOKENS = 1024

# (layer, heads of each token from `Decoder._qkv`) -> context of each token, [tokens, q_heads * head_dim]
Attend = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's parameters on this rank."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor | None  # None: `experts` instead
    down: torch.Tensor | None
    experts: ExpertLayer | None


class Decoder:
    """One rank's decoder.

    Args:
        architecture: the whole model's sizes.
        parameters: this rank's tensors by SGLang name; kept, not copied.
        tp: the ranks that share the model.

    Raises:
        ValueError: a parameter that the architecture needs is missing, or it has a part unknown here.
    """

    def __init__(
        self, architecture: Architecture, parameters: Mapping[str, torch.Tensor], tp: TensorParallel, cache: KVCache
    ) -> None:
        self.architecture, self.tp, self.cache = architecture, tp, cache
        self.head_dim = architecture.head_dim
        self.q_heads = architecture.num_heads // tp.size
        self.kv_heads = cache.kv_heads
        self.embedding = _named(parameters, "model.embed_tokens.weight")
        self.head = self.embedding if architecture.tied else _named(parameters, "lm_head.weight")
        self.final_norm = _named(parameters, "model.norm.weight")
        self.layers = tuple(_layer(architecture, parameters, i, tp) for i in range(architecture.num_layers))
        self.rotary = RotaryTable(architecture, self.embedding.dtype, self.embedding.device)
        device = self.embedding.device.type
        # The C++ ones compute in float32 only.
        implementation = None if self.embedding.dtype == torch.float32 else "reference"
        self._attend_cache = choose("decode_attention", device, implementation)
        self._add_rms_norm = choose("add_rms_norm", device, implementation)

    def reserve(self, rows: int, length: int) -> None:
        """Make room for ``rows`` sequences of up to ``length`` tokens, and forget those before."""
        self.cache.reserve(rows, length)
        self.rotary.reserve(length)

    def prefill(self, tokens: torch.Tensor, lengths: torch.Tensor, sources: torch.Tensor, row: int) -> torch.Tensor:
        """Run prompts and put their keys and values into the cache.

        Args:
            tokens: ``[prompts, longest]`` int64, padded on the right (with any token: under the causal mask no real
                position sees the padding).
            lengths: ``[prompts]`` int64.
            sources: ``[sequences]``: cache row ``row + i`` gets prompt ``sources[i]``.

        Returns:
            Logits after the last token of each prompt, ``[prompts, vocab]`` fp32.
        """
        count, longest = tokens.shape
        cos, sin = self.rotary.rows(torch.arange(longest, device=tokens.device).repeat(count))

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            rotate_(qkv[:, : self.q_heads + self.kv_heads], cos, sin)
            heads = qkv.view(count, longest, -1, self.head_dim)
            queries, keys, values = heads.split([self.q_heads, self.kv_heads, self.kv_heads], 2)
            self.cache.write_prompts(layer, keys, values, sources, row)
            return attend_prompts(queries, keys, values)

        hidden = self._run(tokens.flatten(), attend)
        last = torch.arange(count, device=tokens.device) * longest + lengths - 1
        return self._logits(hidden[last])

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        """One step of the sequences in cache rows ``[0, len(tokens))``.

        Args:
            tokens: ``[running]`` int64, the last token of each, not yet in the cache.
            positions: ``[running]`` int64, where it stands in its sequence.
            length: largest position + 1.

        Returns:
            Logits of the next token, ``[running, vocab]`` fp32.
        """
        cos, sin = self.rotary.rows(positions)

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            return self._attend_cache(qkv, cos, sin, self.cache.layers[layer], positions, length)

        return self._logits(self._run(tokens, attend))

    def _run(self, tokens: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states after the final norm, ``[tokens, hidden]``."""
        eps = self.architecture.norm_eps
        hidden = self._embed(tokens)
        normed = F.rms_norm(hidden, hidden.shape[-1:], self.layers[0].input_norm, eps)
        next_norms = [*(layer.input_norm for layer in self.layers[1:]), self.final_norm]
        for index, (layer, next_norm) in enumerate(zip(self.layers, next_norms, strict=True)):
            context = attend(index, self._qkv(layer, normed))
            normed = self._add_rms_norm(hidden, self.tp.reduce(F.linear(context, layer.o)), layer.post_norm, eps)
            normed = self._add_rms_norm(hidden, self.tp.reduce(self._mlp(layer, normed)), next_norm, eps)
        return normed

    def _qkv(self, layer: Layer, normed: torch.Tensor) -> torch.Tensor:
        """Query, key and value heads of each token, ``[tokens, q_heads + 2 * kv_heads, head_dim]``, not yet turned."""
        qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(len(normed), -1, self.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            eps = self.architecture.norm_eps
            queries, keys = qkv[:, : self.q_heads], qkv[:, self.q_heads : self.q_heads + self.kv_heads]
            queries.copy_(F.rms_norm(queries, (self.head_dim,), layer.q_norm, eps))
            keys.copy_(F.rms_norm(keys, (self.head_dim,), layer.k_norm, eps))
        return qkv

    def _mlp(self, layer: Layer, normed: torch.Tensor) -> torch.Tensor:
        if layer.experts is not None:
            return layer.experts(normed)
        if len(normed) <= MLP_TOKENS:
            return _dense_mlp(layer, normed)
        return torch.cat([_dense_mlp(layer, some) for some in normed.split(MLP_TOKENS)])

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return self.embedding[tokens]
        local = tokens - self.tp.rank * len(self.embedding)
        foreign = (local < 0) | (local >= len(self.embedding))
        rows = self.embedding[local.masked_fill(foreign, 0)].masked_fill(foreign[:, None], 0.0)
        return self.tp.reduce(rows)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.tp.gather_columns(F.linear(hidden, self.head))
        return logits[:, : self.architecture.vocab].float()


def _dense_mlp(layer: Layer, normed: torch.Tensor) -> torch.Tensor:
    assert layer.gate_up is not None
    assert layer.down is not None
    gate, up = F.linear(normed, layer.gate_up).chunk(2, -1)
    return F.linear(F.silu(gate).mul_(up), layer.down)


def _layer(architecture: Architecture, parameters: Mapping[str, torch.Tensor], index: int, tp: TensorParallel) -> Layer:
    prefix = f"model.layers.{index}."

    def take(name: str, wanted: bool = True) -> torch.Tensor | None:
        return _named(parameters, prefix + name) if wanted else None

    experts = architecture.experts
    routed = experts is not None and index not in experts.dense_layers
    return Layer(
        input_norm=_named(parameters, prefix + "input_layernorm.weight"),
        qkv=_named(parameters, prefix + "self_attn.qkv_proj.weight"),
        qkv_bias=take("self_attn.qkv_proj.bias", architecture.qkv_bias),
        q_norm=take("self_attn.q_norm.weight", architecture.qk_norm),
        k_norm=take("self_attn.k_norm.weight", architecture.qk_norm),
        o=_named(parameters, prefix + "self_attn.o_proj.weight"),
        post_norm=_named(parameters, prefix + "post_attention_layernorm.weight"),
        gate_up=take("mlp.gate_up_proj.weight", not routed),
        down=take("mlp.down_proj.weight", not routed),
        experts=_experts(architecture, parameters, prefix + "mlp.", tp) if routed else None,
    )


def _experts(
    architecture: Architecture, parameters: Mapping[str, torch.Tensor], prefix: str, tp: TensorParallel
) -> ExpertLayer:
    assert architecture.experts is not None
    return ExpertLayer(
        architecture.experts,
        gate=_named(parameters, prefix + "gate.weight"),
        w13=_named(parameters, prefix + "experts.w13_weight"),
        w2=_named(parameters, prefix + "experts.w2_weight"),
        tp=tp,
    )


def _named(parameters: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in parameters:
        raise ValueError(
            f"the rollout layout has no {name!r}, which this architecture needs: was it made for another model?"
        )
    return parameters[name]


def attend_prompts(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Causal attention inside each prompt; heads ``[prompts, length, heads, head_dim]``, fewer of keys than of queries
    where grouped. ``[prompts * length, q_heads * head_dim]``."""
    grouped = queries.shape[2] != keys.shape[2]
    context = F.scaled_dot_product_attention(
        queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), is_causal=True, enable_gqa=grouped
    )
    return context.transpose(1, 2).flatten(0, 1).flatten(1)
