"""`DenseMLP`: the gated feed-forward layer, ``down(silu(gate(x)) * up(x))``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from megatron_rl.models.parameters import GateUp, InputColumns, Parameter, Rows


@dataclass(frozen=True, slots=True)
class DenseMLP:
    """One gated feed-forward network."""

    hidden: int
    ffn: int
    fused_in_file: bool = False  # the Hugging Face file has one gate_up_proj, the gate above

    fused_norm: ClassVar[str] = "mlp.linear_fc1.layer_norm_weight"  # Megatron's norm before it, where fused into fc1

    def parameters(self) -> Iterator[Parameter]:
        """Names lack the layer's prefix."""
        yield GateUp(*self._rows(), self.hidden, "mlp.linear_fc1.weight", "mlp.gate_up_proj.weight")
        yield InputColumns("mlp.down_proj.weight", self.hidden, self.ffn, "mlp.linear_fc2.weight")

    def _rows(self) -> tuple[Rows, Rows]:
        """Where both halves lie in the Hugging Face file."""
        if self.fused_in_file:
            both = "mlp.gate_up_proj.weight"
            return Rows(both, 0, self.ffn), Rows(both, self.ffn, self.ffn)
        return Rows("mlp.gate_proj.weight", 0, self.ffn), Rows("mlp.up_proj.weight", 0, self.ffn)
