"""`LatentAttention`: multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

Keys and values of all heads are projected from one small latent vector of each token; so are the queries, or they come
from the hidden state at once. A part of each query head turns with positions, and its counterpart is one key for all
heads. Files and SGLang's and Megatron's parameters agree but for where the two latent projections are stacked.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from megatron_rl.models.architecture import MLA
from megatron_rl.models.components.norm import Norm
from megatron_rl.models.components.position import Rotary, yarn_mscale
from megatron_rl.models.latent_projections import HeadRows, LatentRows
from megatron_rl.models.parameters import InputColumns, Parameter
from megatron_rl.reshard.layout import Recomputed

LATENT_EPS = 1e-6  # of the norms over latents, whatever the config's rms_norm_eps (transformers DeepseekV3Attention)
MODULE = "self_attention."


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Latent projections, their norms, projections to heads, softmax over the keys before, output projection."""

    hidden: int
    num_heads: int
    mla: MLA
    rotary: Rotary  # of the ``rope_dim`` channels of each head

    window: ClassVar[None] = None
    qkv_bias: ClassVar[bool] = False
    o_bias: ClassVar[bool] = False
    softcap: ClassVar[None] = None
    sinks: ClassVar[bool] = False
    q_norm: ClassVar[None] = None  # there are norms over latents, none over heads
    k_norm: ClassVar[None] = None
    fused_norm: ClassVar[str] = ""  # two projections read the norm's output, so Megatron never fuses it

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Channels of a query or key head."""
        return self.mla.nope_dim + self.mla.rope_dim

    @property
    def cached_dim(self) -> int:
        """Channels that a key or a value takes in a cache of both."""
        return max(self.head_dim, self.mla.value_dim)

    @property
    def scale(self) -> float:
        """Of scores; YaRN corrects it where the config has ``mscale_all_dim`` (transformers ``yarn_apply_mscale``)."""
        scaling = dict(self.rotary.scaling)
        weight, factor = scaling.get("mscale_all_dim"), scaling.get("factor")
        correction = yarn_mscale(float(factor), float(weight)) if weight and factor else 1.0  # type: ignore[arg-type]
        return float(self.head_dim**-0.5 * correction**2)

    @property
    def latent_norms(self) -> tuple[Norm | None, Norm]:
        """Over the latents of queries, if they have one, and of keys and values."""
        q_norm = Norm("self_attn.q_a_layernorm.weight", self.mla.q_rank, LATENT_EPS) if self.mla.q_rank else None
        return q_norm, Norm("self_attn.kv_a_layernorm.weight", self.mla.kv_rank, LATENT_EPS)

    def parameters(self) -> Iterator[Parameter]:
        """Names lack the layer's prefix."""
        mla, heads = self.mla, self.num_heads
        down = (
            "self_attn.kv_a_proj_with_mqa.weight",
            mla.kv_rank + mla.rope_dim,
            MODULE + "linear_kv_down_proj.weight",
        )
        q_norm, kv_norm = self.latent_norms
        if q_norm is None:
            yield HeadRows(
                "self_attn.q_proj.weight", heads * self.head_dim, self.hidden, MODULE + "linear_q_proj.weight"
            )
            yield LatentRows((down,), self.hidden, down[0])
        else:
            q_down = ("self_attn.q_a_proj.weight", q_norm.size, MODULE + "linear_q_down_proj.weight")
            yield LatentRows((q_down, down), self.hidden, "self_attn.fused_qkv_a_proj_with_mqa.weight")
            up = MODULE + "linear_q_up_proj."
            yield q_norm.parameter(MODULE + "q_layernorm.weight", up + "layer_norm_weight")
            yield HeadRows("self_attn.q_b_proj.weight", heads * self.head_dim, q_norm.size, up + "weight")
        up = MODULE + "linear_kv_up_proj."
        yield kv_norm.parameter(MODULE + "kv_layernorm.weight", up + "layer_norm_weight")
        yield HeadRows("self_attn.kv_b_proj.weight", heads * (mla.nope_dim + mla.value_dim), mla.kv_rank, up + "weight")
        inputs = heads * mla.value_dim
        yield InputColumns("self_attn.o_proj.weight", self.hidden, inputs, MODULE + "linear_proj.weight")

    def recomputed(self) -> tuple[Recomputed, ...]:
        """The two halves of kv_b_proj that SGLang keeps (its ``post_load_weights`` for DeepSeek)."""
        source, sizes = "self_attn.kv_b_proj.weight", (self.mla.nope_dim, self.mla.value_dim)
        return (
            Recomputed("self_attn.w_kc", source, functools.partial(_keys_of, sizes)),
            Recomputed("self_attn.w_vc", source, functools.partial(_values_of, sizes)),
        )


def _keys_of(sizes: tuple[int, int], kv_b: Tensor) -> Tensor:
    """``[heads, nope_dim, kv_rank]``."""
    return kv_b.unflatten(0, (-1, sum(sizes)))[:, : sizes[0]]


def _values_of(sizes: tuple[int, int], kv_b: Tensor) -> Tensor:
    """``[heads, kv_rank, value_dim]``."""
    return kv_b.unflatten(0, (-1, sum(sizes)))[:, sizes[0] :].transpose(1, 2)
