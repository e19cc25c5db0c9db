"""Multi-head latent attention for the local layer spec: Megatron-Core's `MultiLatentAttention` over our core attention.

Names and shapes of parameters are those of Megatron's `MLASelfAttention` with TransformerEngine. Its own local spec
cuts the projections into latents over tensor-parallel ranks, and then the gradient of the rotary key, which each rank
has for its own heads, is never summed; its rotary embedding makes the angles of packed sequences anew in each layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules, MultiLatentAttention
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from megatron_rl.engines.megatron.model.hidden_states import whole_hidden
from megatron_rl.models.components.mla import LATENT_EPS
from megatron_rl.models.components.position import neighbours_to_halves

# Where TransformerEngine is missing Megatron-Core 0.16.1 imports stand-ins of it, takes those for the real thing and
# asks whether a layer is an instance of one, which is no class.
if not isinstance(multi_latent_attention.TELinear, type):
    multi_latent_attention.HAVE_TE = False


class ReplicatedLinear(torch.nn.Module):
    """A linear layer without bias that every tensor-parallel rank holds whole, over its own part of the sequence."""

    def __init__(self, config: MLATransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        if config.perform_initialization:
            config.init_method(self.weight)  # type: ignore[misc]
        # `finalize_model_grads` then sums the gradients of the ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``[.., inputs] -> [.., outputs]``."""
        return F.linear(x, self.weight)


class LatentAttention(MultiLatentAttention):
    """Causal self-attention over latents, packed or padded, context parallel, for any tensor-parallel size."""

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        interleaved: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, attn_mask_type, attention_type="self", **options)
        del self.rotary_pos_emb  # the core attention turns
        self.interleaved = interleaved
        hidden, latent, heads = config.hidden_size, config.kv_lora_rank, config.num_attention_heads
        if config.q_lora_rank is None:
            self.linear_q_proj = self._to_heads(submodules.linear_q_proj, hidden, heads * self.q_head_dim)
        else:
            self.linear_q_down_proj = ReplicatedLinear(config, hidden, config.q_lora_rank)
            self.linear_q_up_proj = self._to_heads(
                submodules.linear_q_up_proj, config.q_lora_rank, heads * self.q_head_dim
            )
            self.q_layernorm = build_module(submodules.q_layernorm, config, config.q_lora_rank, LATENT_EPS)
        self.linear_kv_down_proj = ReplicatedLinear(config, hidden, latent + config.qk_pos_emb_head_dim)
        both = config.qk_head_dim + config.v_head_dim
        self.linear_kv_up_proj = self._to_heads(submodules.linear_kv_up_proj, latent, heads * both)
        self.kv_layernorm = build_module(submodules.kv_layernorm, config, latent, LATENT_EPS)

    def _to_heads(self, linear: Any, inputs: int, outputs: int) -> torch.nn.Module:
        return build_module(
            linear,
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys ``[s, b, heads, q_head_dim]``, channels that turn first; values; and both latents."""
        config = self.config
        latent, turning_key = self.linear_kv_down_proj(hidden_states).split(
            [config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1
        )
        turning_key = whole_hidden(turning_key, self.pg_collection.tp, config.sequence_parallel)
        both = self._heads(self.linear_kv_up_proj, self.kv_layernorm(latent))
        resting_key, value = both.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        query_latent = hidden_states
        if config.q_lora_rank is None:
            query = self._heads(self.linear_q_proj, hidden_states)
        else:
            query_latent = self.q_layernorm(self.linear_q_down_proj(hidden_states))
            query = self._heads(self.linear_q_up_proj, query_latent)
        resting, turning = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        key = self._halves(turning_key).unsqueeze(-2).expand(*resting_key.shape[:-1], -1)
        query = torch.cat([self._halves(turning), resting], dim=-1)
        return query, torch.cat([key, resting_key], dim=-1), value, query_latent, latent

    def _heads(self, linear: torch.nn.Module, x: Tensor) -> Tensor:
        return linear(x)[0].unflatten(-1, (self.num_attention_heads_per_partition, -1))

    def _halves(self, x: Tensor) -> Tensor:
        return neighbours_to_halves(x) if self.interleaved else x
