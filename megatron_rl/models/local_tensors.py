"""A rank's real parameters under the names that layouts use: the join between model chunks and weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from megatron_rl.models.megatron_chunk import unwrap
from megatron_rl.models.naming import MegatronNaming, chunk_prefix


def chunk_tensors(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The parameters of a rank's chunks, wrapped or not, named as in `megatron_layout`: detached views, no copies."""
    tensors = {}
    for index, chunk in enumerate(chunks):
        prefix = chunk_prefix(index, len(chunks))
        for name, parameter in unwrap(chunk).named_parameters():
            tensors[prefix + name] = parameter.detach()
    return tensors


def naming_of(chunks: Sequence[nn.Module]) -> MegatronNaming:
    """Which of Megatron's spellings the chunks use."""
    return MegatronNaming.detect(chunk_tensors(chunks))
