"""`Scheduler`: one `generate` call as continuous batching.

Prompts are taken longest first, so that those of similar length are prefilled together. While there is room they are
prefilled (each once, however many samples it has) and join the running batch; each step adds one token to every running
sequence; those that end leave at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_rl.parallel.abandon import Abandoned, overdue
from megatron_rl.rollout.base import Completion, SamplingParams
from megatron_rl.rollout.local.decoder import Decoder
from megatron_rl.rollout.local.running import RunningBatch, RunningSequence
from megatron_rl.rollout.local.sampler import draw
from megatron_rl.rollout.local.stopping import StopText, TextDecoder


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """Samples that start together from one prompt."""

    token_ids: Sequence[int]
    sequences: tuple[RunningSequence, ...]


class Scheduler:
    """Runs requests to completion on one decoder.

    Args:
        rows: most sequences at a time; no request has more.
        prefill_tokens: most prompt tokens, padding included, in one prefill (a longer prompt goes alone).
        stop_table: ``[vocab]`` bool.
        version: of the weights, written on every completion.
        emit: receives each finished sequence.
    """

    def __init__(
        self,
        decoder: Decoder,
        params: SamplingParams,
        rows: int,
        prefill_tokens: int,
        stop_table: torch.Tensor,
        version: int,
        emit: Callable[[RunningSequence, Completion], None],
    ) -> None:
        self.decoder, self.params, self.prefill_tokens = decoder, params, prefill_tokens
        self.stop_table, self.version, self.emit = stop_table, version, emit
        self.device = stop_table.device
        self.running = RunningBatch(rows, params.max_tokens, self.device)

    def run(self, requests: Sequence[PrefillRequest]) -> None:
        waiting = deque(sorted(requests, key=lambda request: -len(request.token_ids)))
        while waiting or self.running.count:
            while self._has_room(waiting):
                self._admit(self._pick(waiting))
            if self.running.count:
                self._step()

    def _has_room(self, waiting: deque[PrefillRequest]) -> bool:
        """Prefill interrupts the running sequences, so it waits until an eighth of the rows is free."""
        if not waiting:
            return False
        rows, free = len(self.running.last_tokens), self.running.free
        return free >= max(len(waiting[0].sequences), rows // 8)

    def _pick(self, waiting: deque[PrefillRequest]) -> list[PrefillRequest]:
        picked: list[PrefillRequest] = []
        free = self.running.free
        while waiting and len(waiting[0].sequences) <= free:
            longest = len(picked[0].token_ids) if picked else len(waiting[0].token_ids)
            if picked and longest * (len(picked) + 1) > self.prefill_tokens:
                break
            free -= len(waiting[0].sequences)
            picked.append(waiting.popleft())
        return picked

    def _admit(self, requests: list[PrefillRequest]) -> None:
        lengths = [len(request.token_ids) for request in requests]
        tokens = torch.zeros(len(requests), max(lengths), dtype=torch.int64)
        for row, request in zip(tokens, requests, strict=True):
            row[: len(request.token_ids)] = torch.tensor(request.token_ids)
        sequences = [sequence for request in requests for sequence in request.sequences]
        sources = torch.tensor([i for i, request in enumerate(requests) for _ in request.sequences]).to(self.device)
        prompt_lengths = torch.tensor(lengths).to(self.device)
        rows = self.running.append(sequences, prompt_lengths[sources])
        logits = self.decoder.prefill(tokens.to(self.device), prompt_lengths, sources, rows.start)
        self._advance(rows, logits[sources])

    def _step(self) -> None:
        running = self.running
        positions = running.positions
        logits = self.decoder.decode(running.last_tokens[: running.count], positions, int(positions.max()) + 1)
        self._advance(slice(0, running.count), logits)

    def _advance(self, rows: slice, logits: torch.Tensor) -> None:
        """Draw, record and retire."""
        running = self.running
        tokens, logprobs = draw(logits, running.next_uniforms(rows), self.params)
        if self.decoder.tp.size > 1:
            due = torch.full_like(logprobs, overdue(), dtype=torch.float64)
            agreed = self.decoder.tp.agree(torch.stack([tokens.double(), logprobs.double(), due]))
            tokens, logprobs = agreed[0].long(), agreed[1].float()
            if signal := int(agreed[2, 0]):
                raise Abandoned(signal)
        running.record(rows, tokens, logprobs)
        stopped = self.stop_table[tokens]
        ended = (stopped | (running.generated[rows] >= self.params.max_tokens)).nonzero()[:, 0]
        finished = dict(zip((ended + rows.start).tolist(), stopped[ended].tolist(), strict=True))
        if self.params.stop:
            self._watch(rows, tokens.tolist(), finished)
        if finished:
            self._retire(finished)

    def _watch(self, rows: slice, tokens: list[int], finished: dict[int, bool]) -> None:
        for row, token in enumerate(tokens, rows.start):
            sequence = self.running.sequences[row]
            assert sequence.watch is not None
            sequence.matched = sequence.watch.push(token)
            if sequence.matched is not None:
                finished[row] = True

    def _retire(self, finished: dict[int, bool]) -> None:
        """Emit the finished sequences and close the gaps that they leave."""
        longest = int(self.running.positions.max()) + 1
        for row, completion in zip(finished, self.running.completions(finished, self.version), strict=True):
            self.emit(self.running.sequences[row], completion)
        targets, sources = self.running.remove(sorted(finished))
        if len(targets):
            self.decoder.cache.move(targets, sources, longest)


def request_groups(
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    rows: int,
    stop: Sequence[str],
    tokenizer: TextDecoder | None,
) -> list[PrefillRequest]:
    """One request per prompt, or several where its samples are more than ``rows``.

    Args:
        seeds: of each sample of each prompt.
    """
    requests = []
    for index, (prompt, sample_seeds) in enumerate(zip(prompts, seeds, strict=True)):
        sequences = tuple(
            RunningSequence(index, sample, seed, StopText(stop, tokenizer) if stop and tokenizer else None)
            for sample, seed in enumerate(sample_seeds)
        )
        requests += [
            PrefillRequest(prompt, sequences[start : start + rows]) for start in range(0, len(sequences), rows)
        ]
    return requests
