"""`HFFields`: the fields of a Hugging Face ``config.json`` that are read here, with the types and ranges they can have.

Checked before `transformers` reads the file: it makes a list of a trillion layers where a config asks for them, and a
wrong value that it accepts becomes an error in the middle of building a model. Other fields are left to it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, field_validator

from megatron_rl.config import ConfigRecord
from megatron_rl.config.ranges import Positive

Size = Annotated[int, Field(ge=1, lt=2**31)]
Layer = Annotated[int, Field(ge=0, le=10_000)]
AnyToken = Annotated[int, Field(ge=-1, lt=2**31)]  # -1 is some configs' word for none


class _Fields(ConfigRecord):
    model_config = ConfigDict(extra="ignore", strict=True)


class RopeFields(_Fields):
    """``rope_parameters``, or ``rope_scaling`` as it was called before."""

    rope_theta: Positive | None = Field(default=None, le=1e15)
    """Base of the wavelengths."""
    rope_type: str | None = None
    """Kind of scaling."""
    type: str | None = None
    """Its older name."""
    factor: Positive | None = Field(default=None, le=1e6)
    """By how much positions are stretched."""
    low_freq_factor: Positive | None = None
    """Of Llama 3's scaling."""
    high_freq_factor: Positive | None = None
    """Of Llama 3's scaling."""
    original_max_position_embeddings: Size | None = None
    """Context before the stretching."""
    partial_rotary_factor: float | None = Field(default=None, gt=0.0, le=1.0)
    """Part of each head that turns."""
    attention_factor: Positive | None = Field(default=None, le=1e6)
    """Of YaRN and LongRoPE: what cosines and sines are multiplied by."""
    beta_fast: Positive | None = None
    """Of YaRN: turns within the original context from which a pair is kept."""
    beta_slow: Positive | None = None
    """Of YaRN: turns below which a pair is stretched in full."""
    mscale: float | None = Field(default=None, ge=0.0, le=1e6)
    """Of YaRN."""
    mscale_all_dim: float | None = Field(default=None, ge=0.0, le=1e6)
    """Of YaRN."""
    truncate: bool | None = None
    """Of YaRN: whether its bounds are whole pairs."""
    short_factor: list[Positive] | None = None
    """Of LongRoPE: stretching of each pair within the original context."""
    long_factor: list[Positive] | None = None
    """Of LongRoPE: the same beyond it."""


class LayeredRopeFields(RopeFields):
    """``rope_parameters``, for all layers or for each kind of layer."""

    full_attention: RopeFields | None = None
    """Of layers that see all tokens."""
    sliding_attention: RopeFields | None = None
    """Of layers with a window."""


class HFFields(_Fields):
    """``config.json``."""

    architectures: list[str] | None = None
    """Classes of `transformers`."""
    num_hidden_layers: int | None = Field(default=None, ge=1, le=10_000)
    """Decoder layers."""
    hidden_size: Size | None = None
    """Width."""
    intermediate_size: Size | None = None
    """Width inside the MLP."""
    num_attention_heads: Size | None = None
    """Query heads."""
    num_key_value_heads: Size | None = None
    """Key and value heads."""
    head_dim: Size | None = None
    """Width of a head."""
    vocab_size: Size | None = None
    """Rows of the embedding."""
    max_position_embeddings: Size | None = None
    """Context, tokens."""
    moe_intermediate_size: Size | None = None
    """Width inside an expert."""
    num_experts: Size | None = None
    """Experts of a layer."""
    num_local_experts: Size | None = None
    """Experts of a layer, under another name."""
    num_experts_per_tok: Size | None = None
    """Experts that a token goes to."""
    decoder_sparse_step: Size | None = None
    """Every so many layers one has experts."""
    mlp_only_layers: list[Layer] | None = None
    """Layers without experts."""
    norm_topk_prob: bool | None = None
    """Weights of the chosen experts sum to 1."""
    hidden_act: str | None = None
    """Activation of the MLP."""
    query_pre_attn_scalar: Positive | None = None
    """Attention scores are divided by its square root."""
    attn_logit_softcapping: Positive | None = None
    """Soft cap of attention scores."""
    final_logit_softcapping: Positive | None = None
    """Soft cap of logits."""
    hidden_activation: str | None = None
    """The same, of Gemma."""
    rms_norm_eps: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Epsilon of the norms."""
    rope_theta: Positive | None = Field(default=None, le=1e15)
    """Base of the rotary wavelengths."""
    rope_scaling: RopeFields | None = None
    """Rotary scaling."""
    rope_parameters: LayeredRopeFields | None = None
    """Rotary base and scaling."""
    tie_word_embeddings: bool | None = None
    """Whether the output layer is the embedding."""
    attention_bias: bool | None = None
    """Biases in attention."""
    mlp_bias: bool | None = None
    """Biases in the MLP."""
    shared_expert_intermediate_size: Size | None = None
    """Width inside the shared expert."""
    n_routed_experts: Size | None = None
    """Experts of a layer, under a third name."""
    n_shared_experts: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Experts that every token goes to."""
    n_group: Size | None = None
    """Groups of experts."""
    topk_group: Size | None = None
    """Groups that a token's experts come from."""
    first_k_dense_replace: Layer | None = None
    """Dense layers before those with experts."""
    routed_scaling_factor: Positive | None = None
    """Factor of the router's weights."""
    swiglu_limit: Positive | None = None
    """Bound of gates and of what they multiply."""
    swiglu_alpha: Positive | None = None
    """Slope of the sigmoid in gates."""
    q_lora_rank: Size | None = None
    """Size of the latent of queries."""
    kv_lora_rank: Size | None = None
    """Size of the latent of keys and values."""
    qk_nope_head_dim: Size | None = None
    """Channels of a head that do not turn."""
    qk_rope_head_dim: Size | None = None
    """Channels of a head that turn."""
    v_head_dim: Size | None = None
    """Channels of a value head."""
    use_qk_norm: bool | None = None
    """Norms over query and key heads."""
    sliding_window: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Context of attention, tokens; 0 beside a ``use_sliding_window`` that says no."""
    use_sliding_window: bool | Literal[0, 1] | None = None
    """Whether there is one."""
    partial_rotary_factor: float | None = Field(default=None, gt=0.0, le=1.0)
    """Part of each head that turns."""
    original_max_position_embeddings: Size | None = None
    """Context before rotary positions were stretched."""
    dtype: str | None = None
    """What weights are stored in."""
    torch_dtype: str | None = None
    """Its older name."""
    bos_token_id: AnyToken | None = None
    """First token of texts."""
    eos_token_id: AnyToken | list[AnyToken] | None = None
    """Last tokens of texts."""
    pad_token_id: AnyToken | None = None
    """Token that pads."""
    num_labels: Size | None = None
    """Of a classifier."""
    id2label: dict[str, Any] | None = None
    """Of a classifier."""

    @field_validator("dtype", "torch_dtype")
    @classmethod
    def _floating(cls, name: str | None) -> str | None:
        found = getattr(torch, name.removeprefix("torch."), None) if name not in (None, "auto") else torch.float32
        if not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ValueError("expected the name of a floating dtype, such as bfloat16")
        return name
