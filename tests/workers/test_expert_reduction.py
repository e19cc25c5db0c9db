"""Which experts Megatron-Core would reduce over the wrong ranks; case tp2 of `test_expert_layouts.py` trains them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from megatron_rl.engines.megatron.optimizer import experts_reduced_as_dense


def chunk(tp: int, etp: int | None, marked: bool = False, num_experts: int | None = 4) -> nn.Module:
    module = nn.Module()
    module.mlp = nn.ModuleDict({"experts": nn.Linear(2, 2, bias=False), "router": nn.Linear(2, 2, bias=False)})
    module.mlp["experts"].weight.allreduce = not marked
    module.config = SimpleNamespace(
        num_moe_experts=num_experts, tensor_model_parallel_size=tp, expert_tensor_parallel_size=etp
    )
    return module


def test_experts_that_are_not_split_as_dense_layers_are_need_ranks_of_their_own():
    found = chunk(2, 1)
    (parameter,) = experts_reduced_as_dense([found])
    assert parameter is found.mlp["experts"].weight


@pytest.mark.parametrize(
    "fine", [chunk(1, 1), chunk(2, 2), chunk(2, None), chunk(2, 1, marked=True), chunk(2, 1, num_experts=None)]
)
def test_all_others_stay_as_megatron_marks_them(fine):
    assert experts_reduced_as_dense([fine]) == []
