"""`RunningBatch`: what is known of each sequence that is being generated, as tensors of one row per sequence.

Row i belongs to KV cache row i. Rows ``[0, count)`` are in use; a sequence that ends is replaced by the last ones, so
that no step computes finished rows and no Python loop runs over the active ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_rl.rollout.base import Completion
from megatron_rl.rollout.local.sampler import uniforms
from megatron_rl.rollout.local.stopping import StopText


@dataclass(slots=True)
class RunningSequence:
    """One sequence that is being generated."""

    prompt: int  # index of its prompt
    sample: int  # which of the prompt's samples
    seed: int  # from `sample_seed`
    watch: StopText | None = None
    matched: str | None = None  # the stop text found


class RunningBatch:
    """Up to ``rows`` sequences of up to ``max_tokens`` new tokens."""

    def __init__(self, rows: int, max_tokens: int, device: torch.device) -> None:
        self.sequences: list[RunningSequence] = []
        self.max_tokens, self.device = max_tokens, device
        self.last_tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.prompt_lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.generated = torch.zeros(rows, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(rows, max_tokens, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(rows, max_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, max_tokens, dtype=torch.float32, device=device)
        self._rows = torch.arange(rows, device=device)

    @property
    def count(self) -> int:
        return len(self.sequences)

    @property
    def free(self) -> int:
        return len(self.last_tokens) - self.count

    @property
    def positions(self) -> torch.Tensor:
        """Where each sequence's last token stands, ``[count]``."""
        return (self.prompt_lengths + self.generated)[: self.count] - 1

    def append(self, sequences: Sequence[RunningSequence], prompt_lengths: torch.Tensor) -> slice:
        """Add sequences; returns the rows that they got."""
        rows = slice(self.count, self.count + len(sequences))
        self.sequences.extend(sequences)
        self.prompt_lengths[rows] = prompt_lengths
        self.generated[rows] = 0
        draws = uniforms([sequence.seed for sequence in sequences], self.max_tokens)
        self.uniforms[rows] = torch.from_numpy(draws).to(self.device)
        return rows

    def next_uniforms(self, rows: slice) -> torch.Tensor:
        """The random number of each row's next token, ``[rows]``."""
        return self.uniforms[rows].gather(1, self.generated[rows, None])[:, 0]

    def record(self, rows: slice, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """One more token of each of ``rows``."""
        steps = self.generated[rows]
        self.last_tokens[rows] = tokens
        self.tokens[self._rows[rows], steps] = tokens
        self.logprobs[self._rows[rows], steps] = logprobs
        self.generated[rows] += 1

    def completions(self, stopped: Mapping[int, bool], version: int) -> list[Completion]:
        """The completions of the sequences in the rows ``stopped``, in its order: True where a stop token or text ended
        one, False where it reached its maximum length. One transfer from the device for all of them.

        Raises:
            RuntimeError: log-probabilities are not finite.
        """
        rows = torch.tensor(list(stopped), device=self.device)
        counts, tokens, logprobs = (state[rows].tolist() for state in (self.generated, self.tokens, self.logprobs))
        return [
            self._completion(self.sequences[row], tokens[i][:count], logprobs[i][:count], stopped[row], version)
            for i, (row, count) in enumerate(zip(stopped, counts, strict=True))
        ]

    def _completion(
        self, sequence: RunningSequence, tokens: list[int], logprobs: list[float], stopped: bool, version: int
    ) -> Completion:
        if not all(map(math.isfinite, logprobs)):
            raise RuntimeError(
                f"prompt {sequence.prompt}, sample {sequence.sample}: log-probabilities are not finite, so the weights "
                f"of version {version} give NaN or infinite logits: look at the last update's loss and gradient norm"
            )
        return Completion(
            token_ids=tokens,
            logprobs=logprobs,
            finish_reason="stop" if stopped else "length",
            policy_version=version,
            policy_version_spans=[(version, len(tokens))],
            metadata={} if sequence.matched is None else {"stop": sequence.matched},
        )

    def remove(self, finished: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Close the gaps left by rows ``finished``: the moves made, ``(targets, sources)``, for the KV cache."""
        gone, kept = set(finished), self.count - len(finished)
        sources = [row for row in range(kept, self.count) if row not in gone]
        targets = [row for row in finished if row < kept]
        for target, source in zip(targets, sources, strict=True):
            self.sequences[target] = self.sequences[source]
        del self.sequences[kept:]
        moved = torch.tensor(targets, device=self.device), torch.tensor(sources, device=self.device)
        if targets:
            states = (self.last_tokens, self.prompt_lengths, self.generated, self.uniforms, self.tokens, self.logprobs)
            for state in states:
                state[moved[0]] = state[moved[1]]
        return moved
