"""What is wrong with weights that failed their attestation: which tensors, where, and the likely fault.

Works on one rank, from the sums that all ranks know: a rectangle that holds the values of another one, or those of the
last push, has their checksum. It runs only after a failure, so its cost does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_rl.reshard.layout import matrix_shape
from megatron_rl.reshard.rectangle import Rectangle
from megatron_rl.weights.attestation import Attestor, ChecksumDifference, Checksums, Region

MAX_COMPARED = 1 << 28  # elements read in the search for where a rectangle's values belong
MAX_NAMED = 6  # faults spelled out in a message

FaultKind = Literal["missing", "stale", "permuted", "duplicated", "changed", "padding"]

MEANING: dict[FaultKind, str] = {
    "missing": "is all zeros: its values never arrived",
    "stale": "still holds the values of the last push",
    "permuted": "holds what belongs to {other}",
    "duplicated": "holds a second copy of {other}",
    "changed": "holds other values than the trainer: some elements are flipped, missing or stale",
    "padding": "has values where padding must be zero",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One rectangle of one rank that does not hold what it should. Written by `faults`."""

    kind: FaultKind
    rank: int
    shard: str
    tensor: str = ""  # the logical tensor; "" for padding
    rectangle: Rectangle | None = None
    other: str = ""  # where the values belong

    def __str__(self) -> str:
        place = f"{self.tensor}{self.rectangle} in {self.shard}" if self.tensor else self.shard
        return f"{place} {MEANING[self.kind].format(other=self.other)} ({self.kind})"


class AttestationError(RuntimeError):
    """Rollout weights differ from the trainer's; ``faults`` says where."""

    def __init__(self, rank: int, faults: list[Fault]) -> None:
        self.faults = faults
        named = "; ".join(str(fault) for fault in faults[:MAX_NAMED])
        more = f"; and {len(faults) - MAX_NAMED} more" if len(faults) > MAX_NAMED else ""
        super().__init__(
            f"the weights that arrived on rollout rank {rank} are not the trainer's: {named}{more}. The engine refuses "
            f"them; push again, and if this repeats suspect memory, network or a changed model"
        )


def faults(
    attestor: Attestor, shards: Mapping[str, Tensor], expected: Tensor, previous: Tensor | None = None
) -> list[Fault]:
    """Everything wrong with this rank's ``shards``; empty when all is well.

    Args:
        shards: in the dtypes that their values travelled in (`Attestor.check_dtypes`).
        expected: the sums that all ranks agree on.
        previous: those of the last push; None if there was none.
    """
    wrong = attestor.differences(shards, expected)
    diagnosis = _Diagnosis(attestor, shards, expected.cpu(), None if previous is None else previous.cpu(), wrong)
    found = [diagnosis.fault(difference) for difference in wrong]
    return found + [Fault("padding", attestor.rank, name) for name in attestor.dirty_padding(shards)]


class _Diagnosis:
    def __init__(
        self,
        attestor: Attestor,
        shards: Mapping[str, Tensor],
        expected: Tensor,
        previous: Tensor | None,
        wrong: list[ChecksumDifference],
    ) -> None:
        self._attestor, self._shards, self._expected, self._previous = attestor, shards, expected, previous
        self._wrong = {difference.region.slot for difference in wrong}
        self._intact = {region.slot for region in attestor.held} - self._wrong
        self._left = MAX_COMPARED

    def fault(self, difference: ChecksumDifference) -> Fault:
        region = difference.region
        kind, other = self._kind(difference)
        return Fault(kind, self._attestor.rank, region.offset.shard, region.tensor, region.rectangle, other)

    def _kind(self, difference: ChecksumDifference) -> tuple[FaultKind, str]:
        region = difference.region
        if not _content(self._shards, region).any():
            return "missing", ""
        if self._previous is not None and int(self._previous[region.slot]) == difference.found:
            return "stale", ""
        for candidate in self._candidates(region):
            read = Checksums([candidate._replace(slot=0)], 1, self._attestor.wire)
            if int(read(self._shards)) == int(self._expected[candidate.slot]):
                return "duplicated" if candidate.slot in self._intact else "permuted", _name(candidate)
        return "changed", ""

    def _candidates(self, region: Region) -> Iterator[Region]:
        """The same memory read as each other rectangle of its shape, those of the same tensor first."""
        alike = [
            Region(tensor, rectangle, region.offset, slot)
            for slot, tensor, rectangle in self._attestor.slots
            if slot != region.slot and _shape(rectangle) == _shape(region.rectangle)
        ]
        for candidate in sorted(alike, key=lambda other: other.tensor != region.tensor):
            self._left -= region.rectangle.numel
            if self._left < 0:
                return
            yield candidate


def _content(shards: Mapping[str, Tensor], region: Region) -> Tensor:
    offset, (rows, cols) = region.offset, _shape(region.rectangle)
    shard = shards[offset.shard].detach()
    return shard.view(matrix_shape(tuple(shard.shape)))[offset.row : offset.row + rows, offset.col : offset.col + cols]


def _shape(rectangle: Rectangle) -> tuple[int, int]:
    return rectangle.num_rows, rectangle.num_cols


def _name(region: Region) -> str:
    return f"{region.tensor}{region.rectangle}"
