"""`Group`: the answers to one prompt on their way from the loader to training, and the record of them in a journal.

A group is *waiting* to be sampled, *in flight* while an engine or a reward works on it, and *finished* once it is
scored. Its ticket is its place in the order in which prompts were drawn; tickets are given once in a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from megatron_rl.batch import Prompt, Sample
from megatron_rl.batch.record_bytes import RecordBytesError, from_bytes, to_bytes


class Stage(Enum):
    """Where a group is."""

    WAITING = "waiting"
    IN_FLIGHT = "in flight"
    FINISHED = "finished"


@dataclass(slots=True)
class Group:
    """One prompt and its answers. The buffer fills every field but the last two."""

    ticket: int
    prompt: Prompt
    batch: int = 0  # of the batch law: the step that trains on it
    round: int = 0  # of refilling: 0 = the prompts of the step itself
    draw: int = 0  # how often it was sampled before and given up as too old
    stage: Stage = Stage.WAITING
    version: int = 0  # of its oldest token; since it is in flight
    samples: list[Sample] = field(default_factory=list)  # whoever finished it
    kept: bool = True  # whoever finished it: False = the algorithm's filter wants none of its samples


def oldest_version(samples: Sequence[Sample]) -> int:
    """The version of the oldest token of all ``samples``."""
    spans = (sample.policy_version_spans or [(sample.policy_version, 0)] for sample in samples)
    return min(version for found in spans for version, _ in found)


def group_to_bytes(group: Group) -> bytes:
    """A finished group as the payload of a journal's record.

    Raises:
        RecordBytesError: a sample holds something of another type than a journal takes; the message says where.
    """
    numbers = (group.ticket, group.batch, group.round, group.draw, group.version, group.kept)
    return to_bytes((numbers, group.prompt, group.samples))


def group_from_bytes(data: bytes) -> Group:
    """The finished group that `group_to_bytes` wrote.

    Raises:
        RecordBytesError: ``data`` is no group.
    """
    match from_bytes(data):
        case ((int(ticket), int(batch), int(rounds), int(draw), int(version), bool(kept)), Prompt() as prompt, list(s)):
            return Group(ticket, prompt, batch, rounds, draw, Stage.FINISHED, version, s, kept)
    raise RecordBytesError("a record that is no group")
