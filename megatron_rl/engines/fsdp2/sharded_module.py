"""`ShardedModule`: a `transformers` module under FSDP2 whose forward pass ends with hidden states, or with values.

FSDP2 gathers parameters only in the ``forward`` of what it shards, so this wrapper is the root that it shards. Decoder
layers and an untied embedding are units of their own, gathered for their forward and backward passes; what remains (the
last norm, the output layer) is the root's and stays gathered between the two, when losses are computed from hidden
states.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from megatron_rl.config import ConfigError
from megatron_rl.engines.fsdp2.head import decoder_of
from megatron_rl.engines.fsdp2.lora import LoraAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "module."  # of the wrapped module's parameters


class ShardedModule(nn.Module):
    """The wrapper.

    Args:
        module: with real weights, whatever their values.
        value_layer: the linear layer whose output is the result: a classifier's ``score``; None = hidden states.
    """

    def __init__(self, module: PreTrainedModel, value_layer: nn.Linear | None = None) -> None:
        super().__init__()
        self.module = module
        self.value_head: nn.Linear | None = None  # beside the output layer; added before `shard`
        self._score = [value_layer]  # not registered again
        accepted = inspect.signature(decoder_of(module).forward).parameters
        self.takes_positions = "position_ids" in accepted

    def forward(self, input_ids: Tensor, position_ids: Tensor, cu_seq_lens: Tensor | None = None) -> Tensor:
        """``[rows, columns] -> [rows, columns, hidden]``; of a value model ``[rows, columns, 1]`` fp32.

        Args:
            cu_seq_lens: ``[sequences + 1]`` int32 of sequences that lie end to end in one row; None: a row each.
        """
        given: dict[str, Any] = {"position_ids": position_ids} if self.takes_positions else {}
        if cu_seq_lens is not None:
            longest = int(cu_seq_lens.diff().max())
            given |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
            given |= {"max_length_q": longest, "max_length_k": longest}
        hidden: Tensor = decoder_of(self.module)(input_ids=input_ids, use_cache=False, **given)[0]
        score = self._score[0]
        return hidden if score is None else F.linear(hidden.float(), score.weight.float())

    def learn(self) -> None:
        """Be ready for a training pass, which computes what a pass without gradients does: in training mode routers of
        some models sample experts, and layers are left out. Only recomputation and adapters are told that it is one."""
        self.eval()
        for part in self.modules():
            if isinstance(part, (GradientCheckpointingLayer, LoraAdapter)):
                part.training = True

    # Sharding

    def shard(self, group: dist.ProcessGroup, device: torch.device, compute: torch.dtype, reduce: torch.dtype) -> None:
        """Cut every parameter over the ranks of ``group``; gradients are summed, not averaged.

        Args:
            compute: of gathered weights and of the forward pass.
            reduce: of gradients while they are summed.
        """
        mesh = DeviceMesh.from_group(group, device.type)
        precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
        for unit in self._units():
            fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        fully_shard(self, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo knows no premultiplied sum
        root: Any = self
        root.set_reduce_scatter_unused_params(True)  # an expert without tokens on one rank may have some on another

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        classes = set(self.module._no_split_modules or ())
        found = [part for part in self.module.modules() if type(part).__name__ in classes]
        return found or _longest_list(self.module)

    def _units(self) -> list[nn.Module]:
        layers = self.layers
        embedding, output = self.module.get_input_embeddings(), self.module.get_output_embeddings()
        own = {id(parameter) for parameter in embedding.parameters()}
        tied = output is not None and any(id(parameter) in own for parameter in output.parameters())
        return layers if tied else [embedding, *layers]

    @property
    def units(self) -> list[Any]:
        """The root and everything that is gathered by itself."""
        return [part for part in self.modules() if isinstance(part, FSDPModule)]

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """While open it computes; afterwards nothing is left gathered, so that every pass sees the newest weights."""
        try:
            yield
        except BaseException:
            self.reset_iter_state()  # type: ignore[operator]
            raise
        finally:
            for unit in self.units:
                unit.reshard()

    def named(self) -> dict[str, nn.Parameter]:
        """Parameters by their names in the module; a value head beside the output layer by its own."""
        return {name.removeprefix(PREFIX): parameter for name, parameter in self.named_parameters()}


def _longest_list(module: nn.Module) -> list[nn.Module]:
    """The layers of a module whose class does not say which they are."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    if not lists:
        raise ConfigError(
            f"{type(module).__name__} names no layers to shard by (_no_split_modules) and has no list of layers: set "
            "_no_split_modules to the names of its layers' classes"
        )
    return max((list(found) for found in lists), key=len)


def without_dropout(holder: Any) -> list[str]:
    """Set every dropout among the attributes of a config or a module to 0; returns those that were not."""
    found = []
    for name, value in list(vars(holder).items()):
        is_dropout = name.endswith(("dropout", "pdrop", "_drop", "dropout_prob", "dropout_rate", "layerdrop"))
        if is_dropout and isinstance(value, float) and value > 0:
            setattr(holder, name, 0.0)
            found.append(f"{name}={value}")
    return found
