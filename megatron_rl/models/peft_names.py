"""What PEFT calls the matrices of adapters, and how it holds those of experts.

PEFT names an adapter by the module of `transformers` that it belongs to. `transformers` 5 holds all experts of a layer
in one parameter ``[experts, out, in]``; PEFT (0.21, `tuners/lora/layer.py` ``ParamWrapper``) then has one A
``[experts * r, in]`` and one B ``[out, r * experts]``, in whose columns the expert changes fastest. Here B of experts
is ``[experts * out, r]`` until it is written, so that what a rank holds is a rectangle of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from megatron_rl.models.architecture import Architecture
from megatron_rl.models.layouts import transformers_layout
from megatron_rl.models.transposed_experts import is_transposed

PREFIX = "base_model.model."  # PEFT's names of what it wraps
FIRST, SECOND = "gate_up_proj", "down_proj"  # parameters of one module of experts, in the order that PEFT wraps them
# Names that PEFT takes for those of experts wherever they stand (utils/transformers_weight_conversion.py
# _MOE_TARGET_MODULE_MAPPING): in a mixture a linear layer of such a name is chosen by its parameter.
OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


class ModulePlace(NamedTuple):
    """Where the rows of a logical tensor lie in a parameter of `transformers`."""

    parameter: str
    shape: tuple[int, ...]
    row: int  # of the tensor's first, the parameter seen as a matrix
    transposed: bool = False  # its matrices are [in, out]

    @property
    def outputs(self) -> int:
        """Of one expert, or of the layer."""
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def inputs(self) -> int:
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def num_experts(self) -> int:
        """1 of a linear layer."""
        return self.shape[0] if len(self.shape) == 3 else 1


def module_places(architecture: Architecture) -> dict[str, ModulePlace]:
    """Logical tensor -> its place, of all matrices of a model."""
    return {
        span.tensor: ModulePlace(shard.name, shard.shape, span.row - span.row_start, is_transposed(span.tensor))
        for shard in transformers_layout(architecture).shards(0)
        for span in shard.spans
        if len(shard.shape) > 1
    }


def matrix_names(parameter: str, adapted: Mapping[str, object]) -> tuple[str, str]:
    """Names of A and B of a parameter in a file; ``adapted`` are all parameters with adapters."""
    module, _, name = parameter.rpartition(".")
    if name == FIRST and f"{module}.{SECOND}" in adapted:
        module += ".base_layer"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def experts_last(b: Tensor, num_experts: int) -> Tensor:
    """``[experts * out, r] -> [out, r * experts]``."""
    return b.unflatten(0, (num_experts, -1)).permute(1, 2, 0).flatten(1)


def experts_first(b: Tensor, num_experts: int) -> Tensor:
    """``[out, r * experts] -> [experts * out, r]``."""
    return b.unflatten(1, (-1, num_experts)).permute(2, 0, 1).flatten(0, 1)


def is_mixture(places: Mapping[str, ModulePlace]) -> bool:
    """Whether a model has stacked experts; ``places`` from `module_places`."""
    return any(len(place.shape) == 3 for place in places.values())


def target_of(parameter: str, place: ModulePlace, mixture: bool) -> tuple[str, bool]:
    """What PEFT's config chooses an adapted parameter by: a name, and whether it is one of ``target_parameters`` rather
    than of ``target_modules``."""
    parts = parameter.split(".")
    if len(place.shape) == 3:
        return ".".join(parts[-2:]), True
    if mixture and parts[-2] in OF_EXPERTS:
        return ".".join(parts[-3:]), True
    return parts[-2], False
