"""One GRPO and one DPO step over any engine, each rank on its part of one global batch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from engines.fsdp2.tiny_models import VOCAB

from megatron_rl.algorithms import DPO, GRPO
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.workers import Actor, Reference


class Tokenizer(SimpleNamespace):
    """As little of a tokenizer as an actor needs."""

    pad_token_id, eos_token_id, bos_token_id, pad_token, eos_token = 0, 2, 1, "p", "e"

    def __len__(self) -> int:
        return VOCAB

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))

    def save_pretrained(self, folder: object) -> None:
        """Nothing to save."""


def samples() -> list[Sample]:
    """Nine samples of three prompts."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for group in range(3):
        prompt = Prompt(torch.randint(3, VOCAB, (3 + group,), generator=generator).tolist(), index=group)
        for _ in range(3):
            length = int(torch.randint(1, 8, (1,), generator=generator))
            ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
            reward = float(torch.rand((), generator=generator))
            made.append(Sample(prompt, ids, [-3.0] * length, group=group, reward=reward))
    return made


def part(rows: list, unit: int, engine: TrainingEngine) -> list:
    """This rank's units of ``unit`` rows: the second rank has fewer, the third and others have none."""
    dp, size = engine.context.coordinates.dp, engine.context.dp_size
    split = len(rows) if size == 1 else 2 * len(rows) // (3 * unit) * unit
    bounds = [0, split, len(rows)]
    return rows[bounds[dp] : bounds[dp + 1]] if dp < 2 else []


def grpo_step(actor: Actor) -> dict[str, float]:
    rows = part(samples(), 3, actor.engine)
    given = Batch(samples=rows, temperature=0.8)
    given.sequences["rewards"] = torch.tensor([sample.reward for sample in rows])
    algorithm = GRPO(actor, Reference(actor), kl_coefficient=0.05, entropy_coefficient=0.01, old_logprobs="recompute")
    return algorithm.update()(given).metrics


def dpo_step(actor: Actor) -> dict[str, float]:
    rows = [[1, 5, 6, 7], [1, 5, 8], [1, 9, 10], [1, 9, 11, 4], [1, 3, 4], [1, 3, 5]]
    masks = [[0, 0, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1, 1], [0, 0, 1], [0, 0, 1]]
    pairs = Batch.from_sequences(part(rows, 2, actor.engine), part(masks, 2, actor.engine))
    return DPO(actor, Reference(actor), beta=0.3).update()(pairs).metrics


STEPS = {"grpo": grpo_step, "dpo": dpo_step}
