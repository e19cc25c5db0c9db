"""Do the servers still hold what they were given? Their own checksums now, against those right after the delivery.

Something else may have written to a server: another job that is attached to it, a hand at its endpoints, a fault of
its memory. The names of its weights do not tell that, its checksums do; a server hashes each parameter of each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_rl.rollout.base import WeightCheck
from megatron_rl.rollout.sglang.client import RequestError, ServerError, SGLangClient
from megatron_rl.rollout.sglang.generation import ANSWER_FAULTS
from megatron_rl.rollout.sglang.membership import Membership
from megatron_rl.rollout.sglang.routing import State

MAX_NAMED = 4  # parameters that a fault names

RankSums = Mapping[int, Mapping[str, str]]  # tensor-parallel rank of the server -> parameter -> checksum


async def server_checksums(client: SGLangClient) -> dict[int, dict[str, str]]:
    """What a server's ranks hold now; one pass over all of its weights.

    Raises:
        ServerError, RequestError: it does not say.
    """
    answer = await client.check_weights()
    try:
        return {rank["parallelism_info"][0]["tp_rank"]: dict(rank["checksums"]) for rank in answer["ranks"]}
    except ANSWER_FAULTS as error:
        raise ServerError(f"{client.url} gave no checksums ({type(error).__name__}: {error!s:.100})") from None


async def check_members(membership: Membership, attested: Callable[[str], RankSums | None]) -> WeightCheck:
    """Compare every server that serves.

    Args:
        attested: by a server's url, its checksums right after the delivery; None = they were not asked for.
    """
    compared, faults = 0, []
    for member in membership.of(State.READY):
        given = attested(member.client.url)
        if given is None:
            continue
        try:
            fault = await _fault(member.client, membership.version, given)
        except (ServerError, RequestError):  # it is away: nothing is known, and others see to that
            continue
        compared += 1
        faults += [fault] if fault else []
    return WeightCheck(compared, tuple(faults))


async def _fault(client: SGLangClient, version: int, given: RankSums) -> str:
    """How the server's weights are not those of the delivery; empty where they are."""
    name = await client.weight_version()
    if name != str(version):
        return f"{client.url} serves weights that are named {name!r}, pushed was {version}"
    held = await server_checksums(client)
    parts = []
    for rank, expected in given.items():
        found = held.get(rank, {})
        changed = sorted(n for n in expected.keys() | found.keys() if found.get(n) != expected.get(n))
        if changed:
            more = f" and {len(changed) - MAX_NAMED} more" if len(changed) > MAX_NAMED else ""
            parts.append(f"{', '.join(changed[:MAX_NAMED])}{more} on rank {rank}")
    return f"{client.url} no longer holds what was pushed: {'; '.join(parts)}" if parts else ""
