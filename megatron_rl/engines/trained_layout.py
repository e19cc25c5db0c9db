"""`trained_layout`: where training puts a model's weights, known from its description and the parallel sizes alone."""

from __future__ import annotations

from megatron_rl.engines.fsdp2.shard_layout import fsdp2_layout
from megatron_rl.engines.fsdp2.sizes import require_data_parallel
from megatron_rl.models import Architecture, megatron_layout
from megatron_rl.models.module_architecture import ModuleArchitecture
from megatron_rl.models.pipeline import padded_vocab
from megatron_rl.parallel import RankGrid
from megatron_rl.reshard import Layout


def trained_layout(architecture: Architecture, grid: RankGrid) -> Layout:
    """Megatron-Core's, or FSDP2's of a model without a family.

    Raises:
        ConfigError: the sizes do not fit the model.
    """
    if isinstance(architecture, ModuleArchitecture):
        require_data_parallel(grid.sizes)
        return fsdp2_layout(architecture.tensors, grid.world_size)
    return megatron_layout(architecture, grid, padded_vocab(architecture.vocab, grid.sizes.tp))
