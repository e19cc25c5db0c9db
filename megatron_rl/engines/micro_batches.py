"""Cutting a batch into micro-batches that an engine can run: equal shapes, and equally many on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError
from megatron_rl.data.packing import MicroBatch, pack, pad, split_micro_batches
from megatron_rl.devices import current_platform
from megatron_rl.engines.base import MicroBatching, TrainingEngine
from megatron_rl.engines.engine_config import EngineConfig
from megatron_rl.parallel import ParallelContext


def micro_batching(config: EngineConfig, packs: bool, remedy: str) -> MicroBatching:
    """What ``config`` asks of a model that ``packs`` or not; where it does not say, packed micro-batches if it can.

    Raises:
        ConfigError: it asks for packed ones of a model that does not; the message ends with the ``remedy``.
    """
    if config.packing and not packs:
        raise ConfigError(f"packing=true, but {remedy}")
    packing = packs if config.packing is None else config.packing
    return MicroBatching(config.token_budget, packing, config.micro_batch_size)


def plan_micro_batches(
    batch: Batch, engine: TrainingEngine, units: Sequence[int] | None = None, how: MicroBatching | None = None
) -> list[MicroBatch]:
    """Micro-batches of this rank, all of one shape, and as many on every data-parallel rank (collectives inside the
    model and its gradient reduction are entered equally often). A rank that needs fewer spreads its sequences over all
    of them; only one with fewer units than micro-batches has empty ones.

    Args:
        units: sequences with equal numbers stay in one micro-batch; None = each on its own.
        how: None = the engine's own.

    Raises:
        ConfigError: a token lies outside of the vocabulary, on any data-parallel rank; with tensor parallelism the
            embedding would take it for a row of zeros.
    """
    how, context, align = how or engine.micro_batching, engine.context, engine.alignment
    check_vocab(batch, engine)
    lengths = [align.padded(length) for length in batch.lengths.tolist()]
    if how.packing:
        work, most = lengths, how.token_budget
        shares = split_micro_batches(work, most, units)
    else:
        width = _maximum(max(lengths, default=1), context)
        work, most = [1] * len(lengths), how.rows or max(1, how.token_budget // width)
        shares = fill_rows(range(batch.num_sequences) if units is None else units, most)
    count = _maximum(len(shares), context)
    count = -(-count // engine.micro_batch_multiple) * engine.micro_batch_multiple
    if count > len(shares):
        shares = split_micro_batches(work, most, units, at_least=count)
    if how.packing:
        width = _maximum(max((sum(lengths[i] for i in share) for share in shares), default=1), context)
    width = -(-width // align.row_multiple) * align.row_multiple
    if how.packing:
        return [pack(batch, share, align, width) for share in shares]
    tallest = _maximum(max((len(share) for share in shares), default=1), context)
    return [pad(batch, share, align, width, tallest) for share in shares]


def check_vocab(batch: Batch, engine: TrainingEngine) -> None:
    """Raise ConfigError, on all data-parallel ranks, for token ids outside the model's vocabulary."""
    ids, vocab = batch["input_ids"], engine.architecture.vocab
    least, most = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
    found = _maximum(most if least >= 0 else 2**62 - least, engine.context)
    if vocab and found >= vocab:  # 0: Megatron chunks of a value model without a tokenizer
        token = found if found < 2**62 else 2**62 - found
        raise ConfigError(
            f"a batch has token id {token}, outside the model's vocabulary of {vocab}: it was made with another "
            "model's tokenizer, or the tokenizer's new tokens have no rows in the embedding"
        )


def fill_rows(units: Sequence[int], rows: int) -> list[list[int]]:
    """Sequences in order of their units, cut so that no unit is split and at most ``rows`` lie in a micro-batch (a
    larger single unit has one of its own)."""
    shares: list[list[int]] = []
    for _, unit in itertools.groupby(sorted(range(len(units)), key=units.__getitem__), key=units.__getitem__):
        members = list(unit)
        if not shares or len(shares[-1]) + len(members) > rows:
            shares.append([])
        shares[-1] += members
    return shares


def _maximum(value: int, context: ParallelContext) -> int:
    """The maximum over the data-parallel ranks."""
    if context.grid.dp == 1:
        return value
    tensor = torch.tensor(value, device=current_platform().device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=context.dp_group)
    return int(tensor)
