"""How Megatron-Core names its parameters: it depends on the layer spec and on how many chunks a rank holds.

Layouts name a rank's tensors as ``GPTModel.named_parameters()`` does. With interleaved pipelining a rank holds
several chunks, and each name is preceded by its chunk: ``chunk1.decoder.layers.0.mlp.linear_fc1.weight``. With one
chunk there is no prefix. `engines/megatron/model/model_chunk.py` makes the same names from real model chunks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FUSED = ("linear_qkv.layer_norm_weight", "linear_kv_up_proj.layer_norm_weight")


@dataclass(frozen=True, slots=True)
class MegatronNaming:
    """Which of Megatron's naming schemes a model uses."""

    fused_norms: bool = False  # TransformerEngine: the norm's weight belongs to the linear layer behind it
    grouped_experts: bool = False  # TEGroupedMLP: linear_fc1.weight0, weight1, ... instead of local_experts.0, ...

    @classmethod
    def detect(cls, names: Iterable[str]) -> MegatronNaming:
        """Read the scheme off the parameter names of any chunk that holds a layer.

        Raises:
            ValueError: the experts are a `GroupedMLP` (``experts.weight1``), whose transposed layout is not known here.
        """
        fused = grouped = False
        for name in names:
            fused = fused or name.endswith(FUSED)
            grouped = grouped or "mlp.experts.linear_fc1.weight" in name
            if name.endswith(("mlp.experts.weight1", "mlp.experts.weight2")):
                raise ValueError(
                    f"parameter {name!r} belongs to Megatron's legacy GroupedMLP, whose layout is not supported: "
                    "build the model with SequentialMLP (moe_grouped_gemm=False) or TEGroupedMLP"
                )
        return cls(fused_norms=fused, grouped_experts=grouped)

    def expert_names(self, local: int) -> tuple[str, str]:
        """Names of both matrices of the ``local``-th expert of a rank, within its layer."""
        if self.grouped_experts:
            return f"mlp.experts.linear_fc1.weight{local}", f"mlp.experts.linear_fc2.weight{local}"
        prefix = f"mlp.experts.local_experts.{local}."
        return prefix + "linear_fc1.weight", prefix + "linear_fc2.weight"


def chunk_prefix(chunk: int, num_chunks: int) -> str:
    """What precedes the names of one model chunk."""
    return f"chunk{chunk}." if num_chunks > 1 else ""
