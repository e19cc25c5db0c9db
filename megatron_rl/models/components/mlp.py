"""`DenseMLP`: the gated feed-forward layer, ``down(activation(gate(x)) * up(x))``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from megatron_rl.models.parameters import GateUp, InputColumns, Parameter, Replicated, Rows


@dataclass(frozen=True, slots=True)
class DenseMLP:
    """One gated feed-forward network."""

    hidden: int
    ffn: int
    fused_in_file: bool = False  # the Hugging Face file has one gate_up_proj, the gate above

    activation: str = "silu"  # Hugging Face's name; `models/activations.py` computes it
    bias: bool = False

    fused_norm: ClassVar[str] = "mlp.linear_fc1.layer_norm_weight"  # Megatron's norm before it, where fused into fc1

    def parameters(self) -> Iterator[Parameter]:
        """Names lack the layer's prefix."""
        for suffix, cols in (("weight", self.hidden), ("bias", None)) if self.bias else (("weight", self.hidden),):
            yield GateUp(*self._rows(suffix), cols, f"mlp.linear_fc1.{suffix}", f"mlp.gate_up_proj.{suffix}")
        yield InputColumns("mlp.down_proj.weight", self.hidden, self.ffn, "mlp.linear_fc2.weight")
        if self.bias:
            yield Replicated("mlp.down_proj.bias", (self.hidden,), "mlp.linear_fc2.bias")

    def _rows(self, suffix: str) -> tuple[Rows, Rows]:
        """Where both halves lie in the Hugging Face file."""
        if self.fused_in_file:
            both = f"mlp.gate_up_proj.{suffix}"
            return Rows(both, 0, self.ffn), Rows(both, self.ffn, self.ffn)
        return Rows(f"mlp.gate_proj.{suffix}", 0, self.ffn), Rows(f"mlp.up_proj.{suffix}", 0, self.ffn)
