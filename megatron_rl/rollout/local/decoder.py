"""`Decoder`: a functional pre-norm decoder over one rank's weights as SGLang names and lays them out.

It keeps references to the parameter storage, so weights written in place are used by the next call. `prefill` runs
whole prompts and fills the KV cache; `decode` adds one token to every running sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_rl.models import Architecture, describe
from megatron_rl.models.components.embedding import OutputLayer
from megatron_rl.models.components.mlp import DenseMLP
from megatron_rl.models.components.norm import Norm
from megatron_rl.models.components.position import Rotary
from megatron_rl.ops.selection import choose
from megatron_rl.rollout.local.expert_layer import ExpertLayer
from megatron_rl.rollout.local.feed_forward import feed_forward
from megatron_rl.rollout.local.heads import GroupedHeads, LatentHeads, heads_of
from megatron_rl.rollout.local.kv_cache import KVCache
from megatron_rl.rollout.local.norm_weight import NormWeight
from megatron_rl.rollout.local.prompt_attention import attend_prompts
from megatron_rl.rollout.local.rotary_cache import RotaryCache, rotate_
from megatron_rl.rollout.local.sharding import TensorParallel

# Tokens whose intermediate values, the widest of a layer, exist at once: long prompts take several rounds.
MLP_TOKENS = 1024

# (layer, heads of each token from `Layer.heads`) -> context of each token, [tokens, q_heads * head_dim]
Attend = Callable[["Layer", torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Output:
    """What becomes of the sum over the ranks before it is added to the hidden states."""

    bias: torch.Tensor | None
    norm: NormWeight | None

    def __call__(self, summed: torch.Tensor) -> torch.Tensor:
        summed = summed if self.bias is None else summed.add_(self.bias)
        return summed if self.norm is None else self.norm(summed)


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's parameters on this rank."""

    index: int
    rotary: Rotary
    window: int | None  # tokens that a query sees, itself included
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None  # a score of each query head
    attention_norm: NormWeight
    heads: GroupedHeads | LatentHeads
    o: torch.Tensor
    attention_out: Output
    mlp_norm: NormWeight
    mlp: Callable[[torch.Tensor], torch.Tensor]  # this rank's part of the output
    mlp_out: Output


class Decoder:
    """One rank's decoder.

    Args:
        architecture: the whole model's.
        parameters: this rank's tensors by SGLang name; kept, not copied.
        tp: the ranks that share the model.

    Raises:
        ValueError: a parameter that the model needs is missing, or it has a part unknown here.
    """

    def __init__(
        self, architecture: Architecture, parameters: Mapping[str, torch.Tensor], tp: TensorParallel, cache: KVCache
    ) -> None:
        model = describe(architecture)
        if not isinstance(model.output, OutputLayer):
            raise ValueError(f"a {model.family} model without an output layer generates no tokens")
        self.description, self.softcap = model, model.output.softcap
        self.vocab, self.tp, self.cache = model.embedding.vocab, tp, cache
        self.head_dim, self.kv_heads = cache.head_dim, cache.kv_heads
        self.q_heads = model.shared(lambda layer: layer.attention.num_heads, "attention heads") // tp.size
        self.embedding = _named(parameters, model.embedding.hf)
        self.head = self.embedding if model.tied else _named(parameters, model.output.rollout_name)
        self.final_norm = _norm(model.final_norm, parameters)
        self.layers = tuple(self._layer(parameters, index) for index in range(len(model.layers)))
        self.rotary = {
            rotary: RotaryCache(rotary, self.embedding.dtype, self.embedding.device)
            for rotary in dict.fromkeys(layer.rotary for layer in self.layers)
        }
        device = self.embedding.device.type
        # The C++ ones compute in float32 only.
        implementation = None if self.embedding.dtype == torch.float32 else "reference"
        self._attend_cache = choose("decode_attention", device, implementation)
        self._add_rms_norm = choose("add_rms_norm", device, implementation)

    def _layer(self, parameters: Mapping[str, torch.Tensor], index: int) -> Layer:
        described, prefix = self.description.layers[index], self.description.prefix(index)
        attention, mlp = described.attention, described.mlp
        named = functools.partial(_named, parameters)

        def norm(norm: Norm | None) -> NormWeight | None:
            return None if norm is None else _norm(norm, parameters, prefix)

        return Layer(
            index=index,
            rotary=attention.rotary,
            window=attention.window,
            scale=attention.head_dim**-0.5 if attention.scale is None else attention.scale,
            softcap=attention.softcap,
            sinks=named(prefix + "self_attn.sinks") if attention.sinks else None,
            attention_norm=_norm(described.attention_norm, parameters, prefix),
            heads=heads_of(attention, named, prefix, self.q_heads, self.kv_heads),
            o=named(prefix + "self_attn.o_proj.weight"),
            attention_out=Output(
                named(prefix + "self_attn.o_proj.bias") if attention.o_bias else None,
                norm(described.attention_post_norm),
            ),
            mlp_norm=_norm(described.mlp_norm, parameters, prefix),
            mlp=feed_forward(mlp, named, prefix, self.tp),
            mlp_out=Output(
                named(prefix + "mlp.down_proj.bias") if isinstance(mlp, DenseMLP) and mlp.bias else None,
                norm(described.mlp_post_norm),
            ),
        )

    def reserve(self, rows: int, length: int) -> None:
        """Make room for ``rows`` sequences of up to ``length`` tokens, and forget those before."""
        self.cache.reserve(rows, length)
        for table in self.rotary.values():
            table.reserve(length)

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
        positions = torch.arange(longest, device=tokens.device).repeat(count)
        turns = self._turns(positions, lengths.repeat_interleave(longest))

        def attend(layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
            rotate_(qkv[:, : self.q_heads + self.kv_heads], *turns[layer.rotary])
            heads = qkv.view(count, longest, -1, self.head_dim)
            queries, keys, values = heads.split([self.q_heads, self.kv_heads, self.kv_heads], 2)
            self.cache.write_prompts(layer.index, keys, values, sources, row)
            return attend_prompts(queries, keys, values, layer.scale, layer.window, layer.softcap, layer.sinks)

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
        turns = self._turns(positions, positions + 1)

        def attend(layer: Layer, qkv: torch.Tensor) -> torch.Tensor:
            inputs = (qkv, *turns[layer.rotary], self.cache.layers[layer.index], positions, length)
            window = None if layer.window is None or layer.window >= length else layer.window
            return self._attend_cache(*inputs, layer.scale, window, layer.softcap, layer.sinks)

        return self._logits(self._run(tokens, attend))

    def _turns(self, positions: torch.Tensor, lengths: torch.Tensor) -> dict[Rotary, tuple[torch.Tensor, torch.Tensor]]:
        """Cosines and sines of ``positions`` in sequences of ``lengths``, of each rotary embedding that a layer has."""
        return {rotary: table.rows(positions, lengths) for rotary, table in self.rotary.items()}

    def _run(self, tokens: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Hidden states after the final norm, ``[tokens, hidden]``."""
        hidden = self._embed(tokens)
        normed = self.layers[0].attention_norm(hidden)
        next_norms = [*(layer.attention_norm for layer in self.layers[1:]), self.final_norm]
        for layer, next_norm in zip(self.layers, next_norms, strict=True):
            context = layer.heads.context(attend(layer, layer.heads(normed)))
            normed = self._add(hidden, F.linear(context, layer.o), layer.attention_out, layer.mlp_norm)
            normed = self._add(hidden, self._mlp(layer, normed), layer.mlp_out, next_norm)
        return normed

    def _add(self, hidden: torch.Tensor, partial: torch.Tensor, out: Output, norm: NormWeight) -> torch.Tensor:
        """Add the sum over the ranks to ``hidden``, in place, and return the norm of that."""
        summed, factor = out(self.tp.reduce(partial)), norm.factor
        if factor.dtype != hidden.dtype:
            return norm(hidden.add_(summed))
        return self._add_rms_norm(hidden, summed, factor, norm.eps)

    def _mlp(self, layer: Layer, normed: torch.Tensor) -> torch.Tensor:
        if isinstance(layer.mlp, ExpertLayer) or len(normed) <= MLP_TOKENS:
            return layer.mlp(normed)
        return torch.cat([layer.mlp(some) for some in normed.split(MLP_TOKENS)])

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self._rows(tokens)
        scale = self.description.embedding.scale
        return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=rows.dtype, device=rows.device)

    def _rows(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1 or self.description.embedding.whole_in_rollout:
            return self.embedding[tokens]
        local = tokens - self.tp.rank * len(self.embedding)
        foreign = (local < 0) | (local >= len(self.embedding))
        rows = self.embedding[local.masked_fill(foreign, 0)].masked_fill(foreign[:, None], 0.0)
        return self.tp.reduce(rows)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = F.linear(hidden, self.head)
        if not (self.description.tied and self.description.embedding.whole_in_rollout):
            logits = self.tp.gather_columns(logits)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits[:, : self.vocab].float()


def _norm(norm: Norm, parameters: Mapping[str, torch.Tensor], prefix: str = "") -> NormWeight:
    return NormWeight.of(norm, _named(parameters, prefix + norm.hf))


def _named(parameters: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in parameters:
        raise ValueError(
            f"the rollout layout has no {name!r}, which this architecture needs: was it made for another model?"
        )
    return parameters[name]
