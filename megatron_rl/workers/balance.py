"""Load balancing over data-parallel ranks: which sequences move to another rank for one pass, and the exchange.

Mini-batches are drawn over all ranks and responses differ in length, so one rank may hold twice the tokens of another,
or nothing. `plan_moves` is a pure function of the sizes; every rank computes it alone. Few units move, and none where
the loads are even enough: then the same batch object is returned.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.devices import current_platform
from megatron_rl.parallel.groups import gather_objects

SLACK = 0.1  # by how much the fullest rank may exceed the mean before sequences move


def plan_moves(sizes: Sequence[Sequence[int]]) -> dict[tuple[int, int], int]:
    """The units that move: (rank, number on that rank) -> new rank.

    While the fullest rank is above the mean by more than `SLACK`, or a rank has nothing, the fullest rank that has more
    than one unit gives the emptiest rank the unit whose size is nearest to half of their difference. Every move lowers
    the larger of the two loads.

    Args:
        sizes: work of every unit (its tokens, above 0), by data-parallel rank.
    """
    loads = [sum(row) for row in sizes]
    held = [[(size, rank, unit) for unit, size in enumerate(row)] for rank, row in enumerate(sizes)]
    limit = (1 + SLACK) * sum(loads) / max(len(loads), 1)
    moves: dict[tuple[int, int], int] = {}
    while givers := [rank for rank, units in enumerate(held) if len(units) > 1]:
        giver = max(givers, key=loads.__getitem__)
        taker = min(range(len(loads)), key=loads.__getitem__)
        gap = loads[giver] - loads[taker]
        fitting = [unit for unit in held[giver] if unit[0] < gap]
        if (loads[giver] <= limit and loads[taker]) or not fitting:
            break
        size, rank, unit = chosen = min(fitting, key=lambda unit: (abs(2 * unit[0] - gap), unit))
        held[giver].remove(chosen)
        held[taker].append(chosen)
        loads[giver] -= size
        loads[taker] += size
        moves[rank, unit] = taker
    return {place: target for place, target in moves.items() if target != place[0]}


@dataclass(frozen=True)
class Balanced:
    """A batch after the exchange, and what is needed to send results back."""

    batch: Batch
    units: list[int] | None  # unit of each sequence, as `plan_micro_batches` wants it
    group: dist.ProcessGroup | None = None  # None: nothing moved
    places: list[list[int]] = field(default_factory=list)  # by rank: which sequences of the first batch are there now
    num_tokens: list[int] = field(default_factory=list)  # by rank: of what came from there

    def give_back(self, values: Tensor, original: Batch) -> Tensor:
        """Send ``values`` ``[num_tokens]`` of `batch`, on the CPU, back to the ranks that its sequences came from.
        Collective.

        Returns:
            The values of ``original``, the batch before the exchange.
        """
        if self.group is None:
            return values
        parts = list(values.split(self.num_tokens))
        home = exchange([part.numpy().tobytes() for part in parts], self.group)
        starts = original.cu_seqlens.tolist()
        out = values.new_zeros(original.num_tokens)
        for indices, came in zip(self.places, home, strict=True):
            if indices:
                tokens = [torch.arange(starts[i], starts[i + 1]) for i in indices]
                out[torch.cat(tokens)] = torch.frombuffer(bytearray(came), dtype=values.dtype)
        return out


def balance(
    batch: Batch, group: dist.ProcessGroup | None, units: Sequence[int] | None = None, by_tokens: bool = True
) -> Balanced:
    """Spread the sequences of a batch over the ranks of ``group``; all of them call together.

    Args:
        group: data-parallel ranks; None or one rank: nothing moves.
        units: sequences with equal numbers stay together; None = each on its own.
        by_tokens: False: every sequence is the same work (padded rows).

    Returns:
        The same batch object where nothing moves on any rank; otherwise a batch with token and sequence fields only,
        in the order of the ranks that the sequences came from.
    """
    given = None if units is None else list(units)
    if group is None or group.size() == 1:
        return Balanced(batch, given)
    members: dict[int, list[int]] = {}
    for index in range(batch.num_sequences):
        members.setdefault(index if given is None else given[index], []).append(index)
    work = batch.lengths.clamp_min(1).tolist() if by_tokens else [1] * batch.num_sequences
    moves = plan_moves(gather_objects([sum(work[i] for i in indices) for indices in members.values()], group))
    if not moves:
        return Balanced(batch, given)
    own = group.rank()
    places: list[list[int]] = [[] for _ in range(group.size())]
    for number, indices in enumerate(members.values()):
        places[moves.get((own, number), own)] += indices
    parts = [_SentSequences.of(batch, sorted(indices), given) for indices in places]
    came = exchange([b"" if rank == own else pickle.dumps(part) for rank, part in enumerate(parts)], group)
    return _join(
        [parts[own] if rank == own else pickle.loads(part) for rank, part in enumerate(came)], batch, parts, group
    )


@dataclass(frozen=True)
class _SentSequences:
    """The sequences that one rank sends to one other."""

    indices: list[int]
    lengths: Tensor
    tokens: dict[str, Tensor]
    sequences: dict[str, Tensor]
    units: list[int] | None

    @classmethod
    def of(cls, batch: Batch, indices: list[int], units: list[int] | None) -> _SentSequences:
        chosen = batch.select(indices)
        kept = None if units is None else [units[i] for i in indices]
        return cls(indices, chosen.lengths, chosen.tokens, chosen.sequences, kept)


def _join(parts: list[_SentSequences], batch: Batch, sent: list[_SentSequences], group: dist.ProcessGroup) -> Balanced:
    """One batch of all received sequences; units are renumbered, as equal numbers of two ranks are two units."""
    numbers: dict[tuple[int, int], int] = {}
    units = [
        numbers.setdefault((rank, unit), len(numbers)) for rank, part in enumerate(parts) for unit in part.units or ()
    ]
    joined = Batch(
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), *(part.lengths for part in parts)]).cumsum(0),
        tokens={name: torch.cat([part.tokens[name] for part in parts]) for name in batch.tokens},
        sequences={name: torch.cat([part.sequences[name] for part in parts]) for name in batch.sequences},
        temperature=batch.temperature,
    )
    return Balanced(
        batch=joined,
        units=None if parts[0].units is None else units,
        group=group,
        places=[part.indices for part in sent],
        num_tokens=[int(part.lengths.sum()) for part in parts],
    )


def exchange(payloads: Sequence[bytes], group: dist.ProcessGroup) -> list[bytes]:
    """``payloads[r]`` goes to rank r of the group; returns what every rank sent to this one."""
    device = current_platform().device
    leaving = torch.tensor([len(payload) for payload in payloads], device=device)
    coming = torch.empty_like(leaving)
    dist.all_to_all_single(coming, leaving, group=group)
    out = torch.tensor(bytearray(b"".join(payloads)), dtype=torch.uint8).to(device)
    received = torch.empty(int(coming.sum()), dtype=torch.uint8, device=device)
    dist.all_to_all_single(received, out, coming.tolist(), leaving.tolist(), group=group)
    return [part.cpu().numpy().tobytes() for part in received.split(coming.tolist())]
