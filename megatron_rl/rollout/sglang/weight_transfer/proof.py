"""`prove`: do a server's parameters have the checksums of the shards written? Yes, no, or why that is unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megatron_rl.reshard import Layout
from megatron_rl.rollout.sglang.generation import ANSWER_FAULTS
from megatron_rl.rollout.sglang.sglang_client import ServerError, SGLangClient, version_numbers
from megatron_rl.rollout.sglang.weight_transfer.server_layout import ServerLayout

MAX_NAMED = 6  # parameters that an error names
KNOWN_HASHES = (0, 5, 23)  # the newest SGLang whose checksums were compared with ours

RankSums = Mapping[int, Mapping[str, str]]  # tensor-parallel rank of the server -> parameter -> checksum
ServerSums = Mapping[str, Mapping[str, str]]  # device of a server -> parameter -> checksum


class Proof(NamedTuple):
    """Written by `prove`, which raises where weights are wrong."""

    sums: RankSums  # the server's own, right after the update
    reason: str  # why they could not be compared with those of the shards; "" = they were, and are the same


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


async def prove(
    client: SGLangClient,
    sums: Sequence[ServerSums],
    runs_loader: bool,
    layout: Layout,
    dtype: torch.dtype,
    usual: UsualLayout | None = None,
) -> Proof:
    """Compare what a server holds with what was written.

    Args:
        sums: of the shards of each of its ranks.
        runs_loader: it may hold parameters beside the given ones, and in a layout of its own.
        usual: the layout is only what SGLang's classes usually have.

    Raises:
        ServerError: a rank does not hold the given parameters.
    """
    info = await client.server_info()
    ranks, device = await server_checksums(client), str(info.get("device"))
    if len(ranks) != len(sums):
        raise ServerError(f"{client} has {len(ranks)} ranks, expected {len(sums)}")
    other = ServerLayout.of(layout, dtype).differences(info) if runs_loader else []
    if other:
        return Proof(ranks, f"{client} holds its weights in a layout of its own: {'; '.join(other)}")
    expected: dict[int, Mapping[str, str]] = {tp_rank: sums[tp_rank].get(device, {}) for tp_rank in ranks}
    if version_numbers(str(info.get("version"))) > KNOWN_HASHES and not _any_equal(ranks, expected):
        return Proof(ranks, f"{client} runs SGLang {info.get('version')}, whose checksums may be made in another way")
    if usual is not None:
        return Proof(ranks, "; ".join(filter(None, (usual.compare(client, ranks[i], expected[i]) for i in ranks))))
    unseen = sorted({tensor.name for tensor in layout.recomputed} - {name for held in ranks.values() for name in held})
    for tp_rank, held in ranks.items():
        expected[tp_rank] = {name: value for name, value in expected[tp_rank].items() if name not in unseen}
        if runs_loader:
            held = {name: value for name, value in held.items() if name in expected[tp_rank]}
        compare(f"{client}, rank {tp_rank}", held, expected[tp_rank])
    reason = f"{client} does not report {unseen[:MAX_NAMED]}, which it computes from the weights" if unseen else ""
    return Proof(ranks, reason)


@dataclass
class UsualLayout:
    """Of a model without a family: what is equal proves itself, and whatever differs may just lie otherwise. What was
    proved once must be so ever after."""

    proved: set[str] = field(default_factory=set)  # parameters

    def compare(self, where: object, held: Mapping[str, str], expected: Mapping[str, str]) -> str:
        """Why one rank's parameters are not proved to be those delivered; "" = they are, all of them.

        Raises:
            ServerError: one is no more that was proved before.
        """
        equal = {name for name, value in expected.items() if held.get(name) == value}
        if lost := sorted(self.proved - equal):
            raise ServerError(f"{where} does not hold the weights delivered: {lost[:MAX_NAMED]} differ")
        self.proved |= equal
        unknown = sorted((held.keys() | expected.keys()) - equal)
        if not unknown:
            return ""
        return (
            f"{where} provably holds {len(equal)} of {len(held)} parameters; the class of this model, which has no "
            f"family here, may lay out the others in its own way: {unknown[:MAX_NAMED]}"
        )


def _any_equal(ranks: RankSums, expected: RankSums) -> bool:
    return any(held.get(name) == value for rank, held in ranks.items() for name, value in expected[rank].items())


def compare(where: str, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raises ServerError unless a rank of a server holds what it should and nothing beside it."""
    derived = sorted(found.keys() - expected.keys())
    if derived:
        raise ServerError(
            f"{where} holds {derived[:MAX_NAMED]} beside the weights delivered: derived from them, it would be stale. "
            f"Choose actor.rollout.options.delivery=disk for this model"
        )
    missing = sorted(expected.keys() - found.keys())
    wrong = sorted(name for name in expected.keys() & found.keys() if found[name] != expected[name])
    if missing or wrong:
        raise ServerError(
            f"{where} does not hold the weights delivered: {len(wrong)} parameters differ {wrong[:MAX_NAMED]}, "
            f"{len(missing)} are missing {missing[:MAX_NAMED]}"
        )
