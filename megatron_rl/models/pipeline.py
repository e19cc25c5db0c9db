"""Which layers and vocabulary rows a rank holds, as pure functions of sizes.

`stage_layers` is the one rule for which layers a pipeline rank holds: the layers are dealt in order to ``pp * vpp``
chunks, chunk ``vp_stage * pp + pp_rank`` (Megatron-Core's interleaved order). Where they do not divide, the first
chunks hold one more: the last stage also computes the output layer. The model builder and the weight layouts both
follow this rule.
"""

from __future__ import annotations

from megatron_rl.config import ConfigError


def stage_layers(num_layers: int, pp: int, vpp: int = 1, pp_rank: int = 0, vp_stage: int = 0) -> range:
    """Global 0-based indices of the layers at ``(pp_rank, vp_stage)``, in local order: local index i is ``result[i]``.

    Raises:
        ConfigError: a chunk would hold no layer.
    """
    chunks = pp * vpp
    if num_layers < chunks:
        raise ConfigError(
            f"pp={pp} * vpp={vpp} = {chunks} model chunks, but the model has only {num_layers} layers: "
            f"every chunk needs at least one, lower pp or vpp"
        )
    assert 0 <= pp_rank < pp, f"pp_rank={pp_rank} is outside of pp={pp}"
    assert 0 <= vp_stage < vpp, f"vp_stage={vp_stage} is outside of vpp={vpp}"
    chunk = vp_stage * pp + pp_rank
    size, longer = divmod(num_layers, chunks)
    start = chunk * size + min(chunk, longer)
    return range(start, start + size + (chunk < longer))


def is_uneven(num_layers: int, pp: int, vpp: int = 1) -> bool:
    """Whether some chunks hold more layers than others."""
    return num_layers % (pp * vpp) != 0


def chunk_layout(num_layers: int, pp: int, vpp: int = 1) -> list[list[str]]:
    """The same rule in the form of Megatron-Core's ``pipeline_model_parallel_layout``: layer kinds of each chunk."""
    rows = [
        ["decoder"] * len(stage_layers(num_layers, pp, vpp, pp_rank, vp_stage))
        for vp_stage in range(vpp)
        for pp_rank in range(pp)
    ]
    rows[0].insert(0, "embedding")
    rows[-1].append("loss")
    return rows


def padded_vocab(vocab: int, tp: int = 1, multiple: int = 128) -> int:
    """Rows of Megatron's embedding: ``vocab`` rounded up to a multiple of ``multiple * tp``.

    The rule of Megatron-LM's ``_vocab_size_with_padding``; every rank then owns ``result // tp`` consecutive rows.
    """
    step = multiple * tp
    return -(-vocab // step) * step
