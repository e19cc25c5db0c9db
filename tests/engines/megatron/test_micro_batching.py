"""How a Megatron model's batches may be cut."""

from __future__ import annotations

import pytest
from families import two_layers

from megatron_rl.config import ConfigError
from megatron_rl.engines.engine_config import EngineConfig
from megatron_rl.engines.megatron.build import build
from megatron_rl.parallel import ParallelContext, ParallelSizes


def test_padded_rows_are_refused_where_length_changes_how_positions_turn() -> None:
    """LongRoPE: a short sequence beside a long one would be as long as its row."""
    context = ParallelContext.create(ParallelSizes(), seed=1)
    longrope = two_layers("phi3, phi-4-mini", 250)
    with pytest.raises(ConfigError, match="sequences of more than 64 tokens by other frequencies"):
        build(longrope, context, EngineConfig(packing=False), vocab=250, name="actor")
    assert build(longrope, context, EngineConfig(), vocab=250, name="actor").micro_batching.packing
    plain = two_layers("phi3", 250)
    assert not build(plain, context, EngineConfig(packing=False), vocab=250, name="actor").micro_batching.packing
