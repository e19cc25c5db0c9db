"""KTO's mismatched pairs: each prompt of the batch with a completion of another prompt, for the estimate of the KL.

The pairing is computed over the batches of all data-parallel ranks end to end, so it does not depend on the number of
ranks; only the completions that another rank needs are sent.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.batch import Batch
from megatron_rl.config import ConfigError
from megatron_rl.parallel.groups import gather_objects


def mismatched_indices(prompts: Sequence[Hashable]) -> list[int]:
    """Index of the mismatched completion for each prompt: a permutation.

    Sequences are sorted by prompt and shifted by the count of the most frequent prompt, so that completion and prompt
    differ wherever the batch has enough other prompts. Distinct prompts are shifted by one, as in TRL's
    `_get_kl_dataset`; with pairs, chosen is matched with chosen and rejected with rejected.
    """
    blocks: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        blocks.setdefault(prompt, []).append(index)
    order = [index for members in blocks.values() for index in members]
    shift = max(map(len, blocks.values()), default=0)
    found = [0] * len(order)
    for place, index in enumerate(order):
        found[index] = order[(place + shift) % len(order)]
    return found


def exchange_responses(batch: Batch, group: dist.ProcessGroup | None = None) -> tuple[Batch, Tensor]:
    """Each prompt followed by its mismatched completion, and whether that completion is to another prompt.

    The prompt is everything before a sequence's first response token; a sequence without any has an empty completion.
    Reads ``input_ids`` and ``response_mask``; only these are in the result.

    Args:
        group: the data-parallel ranks; None for one process. All of them call together.

    Returns:
        The mismatched sequences of this rank's prompts, and bool ``[num_sequences]``.

    Raises:
        ConfigError: on every rank, when the whole batch has one prompt only.
    """
    rows = [split_row(batch, start, stop) for start, stop in itertools.pairwise(batch.cu_seqlens.tolist())]
    shares = gather_objects([digest(prompt) for prompt, *_ in rows], group)
    prompts = [prompt for share in shares for prompt in share]
    if len(set(prompts)) == 1:
        raise ConfigError(
            f"KTO estimates its KL from responses to other prompts, but the whole batch of {len(prompts)} sequences "
            "has one prompt: give it at least 2 prompts (a larger batch), or set estimate_kl=False (z = 0)"
        )
    partner = mismatched_indices(prompts)
    first = sum(map(len, shares[: group.rank()])) if group is not None else 0
    mine = range(first, first + len(rows))
    sent = {j: rows[j - first][1:] for i, j in enumerate(partner) if j in mine and i not in mine}
    responses = {j: row[1:] for j, row in zip(mine, rows, strict=True)}
    responses |= {j: response for part in gather_objects(sent, group) for j, response in part.items()}
    taken = [(prompt, *responses[partner[i]]) for i, (prompt, *_) in zip(mine, rows, strict=True)]
    exchanged = Batch.from_sequences(
        [prompt + response for prompt, response, _ in taken], [[0] * len(prompt) + mask for prompt, _, mask in taken]
    )
    exchanged.temperature = batch.temperature
    return exchanged, torch.tensor([prompts[i] != prompts[partner[i]] for i in mine], dtype=torch.bool)


def split_row(batch: Batch, start: int, stop: int) -> tuple[list[int], list[int], list[int]]:
    """Prompt, response and the response's mask of the sequence between two positions."""
    token_ids = batch["input_ids"][start:stop].tolist()
    mask = batch["response_mask"][start:stop].int().tolist()
    border = mask.index(1) if 1 in mask else len(mask)
    return token_ids[:border], token_ids[border:], mask[border:]


def digest(token_ids: list[int]) -> bytes:
    """A key of the prompt that is the same on every rank."""
    return hashlib.blake2b(torch.tensor(token_ids).numpy().tobytes(), digest_size=16).digest()
