"""`Batch`: the record that a flow hands from stage to stage.

Three kinds of field. ``prompts`` and ``samples`` are lists of records. *Token fields* are packed tensors
``[num_tokens]``: all sequences end to end, without padding, sequence i at ``cu_seqlens[i]:cu_seqlens[i + 1]``; the
value at a position belongs to the token *at* that position. *Sequence fields* are tensors ``[num_sequences]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_rl.batch.sample import Prompt, Sample
from megatron_rl.batch.work_time import WorkTime

RECORD_FIELDS = ("prompts", "samples", "metrics")


@dataclass
class Batch:
    """Named fields of one step on one data-parallel rank.

    Well-known token fields: ``input_ids`` int64, ``response_mask`` bool (1 = a response token to train on),
    ``rollout_logprobs``, ``old_logprobs``, ``ref_logprobs``, ``values``, ``advantages``, ``returns`` fp32.
    Well-known sequence fields: ``rewards`` fp32, ``groups`` int64.
    """

    prompts: list[Prompt] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    cu_seqlens: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    tokens: dict[str, Tensor] = field(default_factory=dict)
    sequences: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    work: list[WorkTime] = field(default_factory=list)  # stages: when this rank did what, for the trace of a run
    share: tuple[int, int] | None = None  # the loader: (data-parallel rank, ranks) that the prompts are meant for
    temperature: float = 1.0  # actor.sample: logits are divided by it wherever log-probabilities are computed

    @classmethod
    def from_samples(cls, samples: Sequence[Sample]) -> Batch:
        """Pack samples: ``input_ids``, ``response_mask``, ``rollout_logprobs``, ``groups`` and, where every sample
        has one, ``rewards``. Tensors are on the CPU."""
        rows = [s.prompt.token_ids + s.response_ids for s in samples]
        masks = [[0] * len(s.prompt.token_ids) + s.mask for s in samples]
        logprobs = [[0.0] * len(s.prompt.token_ids) + list(s.rollout_logprobs) for s in samples]
        batch = cls.from_sequences(rows, response_mask=masks)
        batch.samples = list(samples)
        batch.tokens["rollout_logprobs"] = _flatten(logprobs, torch.float32)
        batch.sequences["groups"] = torch.tensor([s.group for s in samples], dtype=torch.int64)
        rewards = [s.reward for s in samples if s.reward is not None]
        if len(rewards) == len(samples):
            batch.sequences["rewards"] = torch.tensor(rewards, dtype=torch.float32)
        return batch

    @classmethod
    def from_sequences(cls, token_ids: Sequence[Sequence[int]], response_mask: Sequence[Sequence[int]]) -> Batch:
        """Pack plain token lists and their masks."""
        lengths = torch.tensor([len(row) for row in token_ids], dtype=torch.int64)
        batch = cls(cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))
        batch.tokens["input_ids"] = _flatten(token_ids, torch.int64)
        batch.tokens["response_mask"] = _flatten(response_mask, torch.bool)
        return batch

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_tokens(self) -> int:
        return int(self.cu_seqlens[-1])

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, ``[num_sequences]`` int64."""
        return self.cu_seqlens.diff()

    @property
    def sequence_ids(self) -> Tensor:
        """Which sequence each token belongs to, ``[num_tokens]`` int64."""
        return torch.repeat_interleave(torch.arange(self.num_sequences), self.lengths)

    def __contains__(self, name: str) -> bool:
        if name in RECORD_FIELDS:
            return bool(getattr(self, name))
        return name in self.tokens or name in self.sequences

    def __getitem__(self, name: str) -> Tensor:
        """A token or sequence field by name.

        Raises:
            KeyError: no such field; the message lists those present.
        """
        for fields in (self.tokens, self.sequences):
            if name in fields:
                return fields[name]
        raise KeyError(f"batch has no field {name!r}; it has {', '.join(self)}")

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in RECORD_FIELDS if getattr(self, name))
        yield from self.tokens
        yield from self.sequences

    def free(self, name: str) -> None:
        """Drop one field; a flow calls this after the field's last reader."""
        if name in RECORD_FIELDS:
            getattr(self, name).clear()
        self.tokens.pop(name, None)
        self.sequences.pop(name, None)

    def select(self, indices: Sequence[int]) -> Batch:
        """The sub-batch of the given sequences, in the given order; tensors are copied."""
        picked = torch.as_tensor(indices, dtype=torch.int64)
        starts = self.cu_seqlens.tolist()
        places = [torch.arange(starts[i], starts[i + 1]) for i in picked.tolist()]
        index = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
        return Batch(
            prompts=self.prompts,
            samples=[self.samples[i] for i in picked.tolist()] if self.samples else [],
            cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths[picked].cumsum(0)]),
            tokens={name: value[index] for name, value in self.tokens.items()},
            sequences={name: value[picked] for name, value in self.sequences.items()},
            temperature=self.temperature,
        )


def _flatten(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=dtype)
