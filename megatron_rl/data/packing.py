"""Packing: which sequences share a micro-batch, and where each of their tokens goes on this rank.

A `MicroBatch` is index arrays into a `Batch`, nothing more: for every local position the token that stands there
(`input_index`) and the token that the model predicts there (`target_index`). Inputs, labels and loss fields are gathers
through these, results go back by a scatter, and masks can therefore not shift under context parallelism or packing.

Packed: all sequences end to end in one row, one padding sequence last. Padded: one row a sequence. Context parallelism
splits every sequence into ``2 * cp`` chunks and gives rank r chunks r and ``2 * cp - 1 - r`` (the balanced "zig-zag"
order of Megatron-Core, `get_batch_on_this_cp_rank` and TransformerEngine's THD slicing).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rl.batch import Batch


@dataclass(frozen=True, slots=True)
class Alignment:
    """What the parallel layout demands of lengths, and this rank's place in it."""

    cp_size: int = 1
    cp_rank: int = 0
    tp_size: int = 1  # >1 only with sequence parallelism, which splits positions over the tensor-parallel ranks

    @property
    def sequence_multiple(self) -> int:
        """Every sequence is padded to a multiple of this many tokens."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def row_multiple(self) -> int:
        """Every row of the micro-batch is padded to a multiple of this many tokens."""
        return self.sequence_multiple * self.tp_size

    def padded(self, length: int) -> int:
        return _round_up(length, self.sequence_multiple)


@dataclass(frozen=True)
class MicroBatch:
    """One forward's worth of sequences on one rank. ``n = rows * columns`` local positions, row-major."""

    rows: int
    columns: int
    input_index: Tensor  # [n] int64: index into the batch's token fields; -1 on padding
    target_index: Tensor  # [n] int64: index of the token predicted here; -1 at sequence ends and on padding
    position_ids: Tensor  # [n] int64: position inside the sequence
    sequence_ids: Tensor  # [n] int64: which of `members`; 0 on padding (where every mask is 0)
    members: tuple[int, ...]  # indices of the batch's sequences
    cu_seqlens: Tensor | None  # [s + 1] int32 of the padded sequences over all cp ranks; None = padded rows

    def input_ids(self, batch: Batch) -> Tensor:
        """``[rows, columns]`` int64; 0 on padding."""
        return gather(batch.tokens["input_ids"], self.input_index).view(self.rows, self.columns)

    def labels(self, batch: Batch) -> Tensor:
        """The token predicted at each position, ``[n]`` int64; 0 where none is."""
        return gather(batch.tokens["input_ids"], self.target_index)

    def token_fields(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """Predictor-aligned token fields, each ``[n]``."""
        return {name: gather(batch.tokens[name], self.target_index) for name in names}

    def sequence_fields(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """Sequence fields of the members, each ``[len(members)]``."""
        return {name: batch.sequences[name][list(self.members)] for name in names}

    def scatter(self, values: Tensor, out: Tensor) -> None:
        """Write predictor-aligned ``values`` ``[n]`` to the tokens they belong to in ``out`` ``[num_tokens]``."""
        known = self.target_index >= 0
        out[self.target_index[known]] = values[known].to(out)


def gather(field: Tensor, index: Tensor, fill: float = 0) -> Tensor:
    """``field[index]`` with ``fill`` where the index is negative."""
    if field.numel() == 0:
        return field.new_full(index.shape, fill)
    return torch.where(index >= 0, field[index.clamp_min(0)], field.new_full((), fill))


def split_micro_batches(
    lengths: Sequence[int], token_budget: int, units: Sequence[int] | None = None, at_least: int = 0
) -> list[list[int]]:
    """Share sequences out over few micro-batches within the budget, evenly filled.

    A unit above the budget gets a micro-batch of its own. The others go, longest first, into the emptiest micro-batch
    (LPT scheduling, Graham 1969: the fullest is within 4/3 of the best), their number growing from the least possible
    until all fit; at the number that first-fit-decreasing needs, its packing is taken if LPT's does not fit. So they
    are at most 11/9 of the fewest possible, plus 6/9 (Dosa 2007).

    Args:
        lengths: tokens of each sequence, padding included.
        token_budget: tokens a micro-batch may hold.
        units: sequences with equal numbers stay in one micro-batch (preference pairs); None = each on its own.
        at_least: lower bound on the number of micro-batches; none is empty while there are as many units.

    Returns:
        Indices of the sequences of each micro-batch, ascending inside each.
    """
    members: dict[int, list[int]] = {}
    for index in range(len(lengths)):
        members.setdefault(index if units is None else units[index], []).append(index)
    sizes = {unit: sum(lengths[i] for i in indices) for unit, indices in members.items()}
    order = sorted(sizes, key=lambda unit: (-sizes[unit], unit))
    oversized = [[unit] for unit in order if sizes[unit] > token_budget]
    rest = order[len(oversized) :]
    total = sum(sizes[unit] for unit in rest)
    least = max(at_least - len(oversized), math.ceil(total / token_budget), 1 if rest else 0)
    shares = _emptiest_first(rest, sizes, least)
    if not _fit(shares, sizes, token_budget):
        first_fit = _first_fit(rest, sizes, token_budget)
        even = (_emptiest_first(rest, sizes, count) for count in range(least + 1, len(first_fit) + 1))
        fitting = (found for found in even if _fit(found, sizes, token_budget))
        shares = next(fitting, _split_up(first_fit, sizes, least))
    return [sorted(i for unit in share for i in members[unit]) for share in (*oversized, *shares)]


def _fit(shares: Sequence[Sequence[int]], sizes: Mapping[int, int], budget: int) -> bool:
    return all(sum(sizes[unit] for unit in share) <= budget for share in shares)


def _split_up(shares: list[list[int]], sizes: Mapping[int, int], count: int) -> list[list[int]]:
    """At least ``count`` shares, by halving the fullest ones as long as one has several units."""
    while len(shares) < count and (several := [share for share in shares if len(share) > 1]):
        fullest = max(several, key=lambda share: sum(sizes[unit] for unit in share))
        shares = [*(share for share in shares if share is not fullest), *_emptiest_first(fullest, sizes, 2)]
    return shares + [[]] * (count - len(shares))


def _emptiest_first(units: Sequence[int], sizes: Mapping[int, int], count: int) -> list[list[int]]:
    """Each unit, in the given order, to the emptiest of ``count`` shares."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for unit in units:
        target = min(range(count), key=loads.__getitem__)
        shares[target].append(unit)
        loads[target] += sizes[unit]
    return shares


def _first_fit(units: Sequence[int], sizes: Mapping[int, int], budget: int) -> list[list[int]]:
    """Each unit, in the given order, to the first share with room for it."""
    shares: list[list[int]] = []
    loads: list[int] = []
    for unit in units:
        target = next((i for i, load in enumerate(loads) if load + sizes[unit] <= budget), len(shares))
        if target == len(shares):
            shares.append([])
            loads.append(0)
        shares[target].append(unit)
        loads[target] += sizes[unit]
    return shares


def pack(batch: Batch, members: Sequence[int], align: Alignment, total: int | None = None) -> MicroBatch:
    """Lay the sequences end to end in one row; ``total`` is the row's length over all cp ranks (None = just enough)."""
    starts = batch.cu_seqlens.tolist()
    lengths = [starts[i + 1] - starts[i] for i in members]
    padded = [align.padded(length) for length in lengths]
    total = _round_up(sum(padded), align.row_multiple) if total is None else total
    if (rest := total - sum(padded)) < 0:
        raise ValueError(f"{sum(padded)} tokens do not fit a micro-batch of {total}")
    places = [(starts[i], length) for i, length in zip(members, lengths, strict=True)]
    if rest:
        places.append((0, 0))
        padded.append(rest)
    cu_seqlens = torch.tensor([0, *padded], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return _micro_batch(places, padded, align, tuple(members), 1, cu_seqlens)


def pad(
    batch: Batch, members: Sequence[int], align: Alignment, columns: int | None = None, rows: int | None = None
) -> MicroBatch:
    """Give every sequence a row of ``columns`` tokens over all cp ranks (None = as long as the longest needs), and add
    empty rows up to ``rows``."""
    starts = batch.cu_seqlens.tolist()
    lengths = [starts[i + 1] - starts[i] for i in members]
    width = _round_up(max(lengths, default=1), align.row_multiple) if columns is None else columns
    rows = max(len(members), 1) if rows is None else rows
    places = [(starts[i], length) for i, length in zip(members, lengths, strict=True)]
    places += [(0, 0)] * (rows - len(members))
    return _micro_batch(places, [width] * rows, align, tuple(members), rows)


def _micro_batch(
    places: Sequence[tuple[int, int]],
    widths: Sequence[int],
    align: Alignment,
    members: tuple[int, ...],
    rows: int,
    cu_seqlens: Tensor | None = None,
) -> MicroBatch:
    """This rank's positions of sequences, one after another.

    Args:
        places: start in the batch and length of each sequence; length 0 = padding, which comes last.
        widths: what each is padded to, over all context-parallel ranks.
    """
    table = torch.tensor([*zip(*places, strict=True), widths], dtype=torch.int64)
    number = torch.repeat_interleave(torch.arange(len(widths)), table[2] // align.cp_size)
    start, length, width = table[:, number]
    before = (table[2] // align.cp_size).cumsum(0)[number] - width // align.cp_size
    position = torch.arange(number.numel()) - before
    if align.cp_size > 1:  # the first half of the local positions is chunk cp_rank, the second its mirror image
        chunk = width // (2 * align.cp_size)
        mirrored = (2 * align.cp_size - 1 - align.cp_rank) * chunk + position - chunk
        position = torch.where(position < chunk, align.cp_rank * chunk + position, mirrored)
    return MicroBatch(
        rows=rows,
        columns=number.numel() // rows,
        input_index=torch.where(position < length, start + position, -1),
        target_index=torch.where(position + 1 < length, start + position + 1, -1),
        position_ids=position,
        sequence_ids=torch.where(length > 0, number, 0),
        members=members,
        cu_seqlens=cu_seqlens,
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
