"""`Architecture`: the sizes and options of a decoder, independent of how Hugging Face, Megatron and SGLang name them.

Layouts, the Megatron builder and the local rollout engine all read this record; families translate a Hugging Face
config to and from it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture-of-experts part of an `Architecture`; `models/routing.py` says how experts are chosen."""

    num_experts: int
    experts_per_token: int
    ffn: int  # intermediate size of one expert
    normalize_weights: bool = True  # router weights of the chosen experts are rescaled to sum to 1
    shared_ffn: int = 0  # intermediate size of the shared expert, which sees every token; 0 = none
    shared_gate: bool = False  # the shared expert's output is multiplied with the sigmoid of a projection to one number
    dense_layers: tuple[int, ...] = ()  # layers with a dense MLP instead of experts
    scoring: str = "softmax"  # of the router's logits: "softmax" over all experts, or "sigmoid" of each
    correction_bias: bool = False  # an fp32 number for each expert is added to its score for the choice alone
    num_groups: int = 1  # groups of consecutive experts
    chosen_groups: int = 1  # groups that a token's experts come from
    group_scored_by: int = 2  # how many of its best experts make up a group's score
    scaling: float = 1.0  # of the weights of the chosen experts
    biased: bool = False  # router and experts have biases, and files hold the experts transposed
    clamp: float | None = None  # gates and what they multiply stay within it, by gpt-oss's activation


@dataclass(frozen=True, slots=True)
class MLA:
    """The sizes of multi-head latent attention (`models/components/mla.py`) in an `Architecture`."""

    q_rank: int | None  # of the latent of queries; None = they are projected from the hidden state
    kv_rank: int  # of the latent of keys and values
    nope_dim: int  # channels of a query or key head that do not turn
    rope_dim: int  # those that do, behind them
    value_dim: int  # channels of a value head
    interleaved: bool = True  # channels 2i and 2i + 1 turn together, in place of i and i + rope_dim / 2


@dataclass(frozen=True, slots=True)
class Architecture:
    """Sizes and switches of a pre-norm, rotary decoder with gated feed-forward layers."""

    family: str  # Hugging Face model_type: "llama", "qwen2", "qwen3", "qwen3_moe"
    num_layers: int
    hidden: int
    ffn: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int  # logical vocabulary: rows of the Hugging Face embedding, without any padding
    tied: bool  # the output layer is the embedding
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each query and key head
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, object], ...] = ()  # Hugging Face's, sorted items, lists as tuples; () = none
    rotary_fraction: float = 1.0  # part of a head, from its first channel, that turns
    max_positions: int = 4096
    experts: Experts | None = None
    mla: MLA | None = None  # in place of grouped-query attention; ``head_dim`` is nope_dim + rope_dim
    window: int | None = None  # keys that a query sees, its own included; None = all before it
    full_layers: tuple[int, ...] = ()  # layers that see all keys, where the others have a window
    window_theta: float | None = None  # base of unscaled rotary positions in layers with a window; None = as elsewhere
    o_bias: bool = False  # the output projection of attention has a bias
    mlp_bias: bool = False  # the dense feed-forward layers have biases
    activation: str = "silu"  # of the gate, as Hugging Face names it
    query_scalar: float | None = None  # scores are divided by its square root; None = by that of head_dim
    attention_softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    logit_softcap: float | None = None  # the same of logits
    norm_offset: float = 0.0  # norms multiply with this plus their weight
    sinks: bool = False  # each head has a score beside those of its keys that has no value
    post_norms: bool = False  # norms also behind attention and feed-forward layer, before their output is added
    scaled_embedding: bool = False  # embeddings are multiplied with the square root of their size
    value_model: bool = False  # the output layer is one number a position, ``score.weight``, instead of the vocabulary
