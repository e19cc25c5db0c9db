"""Do the servers still hold what they were given? Their own checksums now, against those right after the push.

Something else may have written to a server: another job that is attached to it, a hand at its endpoints, a fault of
its memory. The names of its weights do not tell that, its checksums do; a server hashes each parameter of each rank.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_rl.rollout.base import WeightCheck
from megatron_rl.rollout.sglang.membership import Membership
from megatron_rl.rollout.sglang.routing import State
from megatron_rl.rollout.sglang.sglang_client import RequestError, ServerError, SGLangClient
from megatron_rl.rollout.sglang.weight_transfer import RankSums, server_checksums

MAX_NAMED = 4  # parameters that a fault names


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
