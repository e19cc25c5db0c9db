"""Test program of several ranks: every algorithm learns a small task on a small model.

Online algorithms: raise the share of generated tokens that contain the letter "s". Preferences and labels: prefer happy
endings, measured on prompts that training never saw. Prints one JSON line per algorithm with the measure before and
after. Usage: learning_program.py MODEL TP ALGORITHM [ALGORITHM ...]
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoTokenizer

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl.algorithms import ALGORITHMS, BaseAlgorithm
from megatron_rl.algorithms.advantages import sum_over_tokens
from megatron_rl.algorithms.offline import OfflineAlgorithm, PairwiseAlgorithm
from megatron_rl.algorithms.reward_modelling import append_value_tokens
from megatron_rl.batch import Batch, Prompt
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers import Actor, Critic, Reference, RewardModel

NAMES = [
    "Mia",
    "Tom",
    "Lily",
    "Ben",
    "Anna",
    "Sam",
    "Lucy",
    "Max",
    "Sue",
    "Tim",
    "Jane",
    "Jack",
    "Amy",
    "Bob",
    "Kate",
    "Leo",
]
GOOD = [" happy and smiled.", " very glad and sang.", " kind and had fun."]
BAD = [" sad and cried.", " angry and yelled.", " scared and ran."]
SETTINGS: dict[str, dict] = {
    "dr-grpo": {"norm_length": 24},
    "gspo": {"clip_low": 0.02, "clip_high": 0.02, "num_mini_batches": 2},
    "gmpo": {"num_mini_batches": 2},
    "cispo": {"num_mini_batches": 2},
    "sapo": {"num_mini_batches": 2},
    "dpo": {"beta": 0.5},
    "kto": {"beta": 0.5},
    "ppo": {"kl_coefficient": 0.005},
}
ONLINE_STEPS, OFFLINE_STEPS = 10, 10


class Task:
    """Parts that are built once per process; every algorithm starts from the pretrained weights again."""

    def __init__(self, model: str, tp: int) -> None:
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.context = ParallelContext.create(ParallelSizes(tp=tp), seed=0)
        adam = OptimizerConfig(learning_rate=1e-3)
        self.config = Actor.Config(optimizer=adam, token_budget=2048)

    def own(self, rows: list) -> list:
        """This data-parallel rank's contiguous share."""
        size = len(rows) // self.context.grid.dp
        return rows[self.context.coordinates.dp * size :][:size]

    def story(self, name: str) -> list[int]:
        return self.tokenizer.encode(f"Once upon a time, there was a child named {name}. {name} was")

    def pairs(self, names: list[str], spread: bool = True) -> Batch:
        rows = [
            (self.story(name), self.tokenizer.encode(ending, add_special_tokens=False))
            for number, name in enumerate(names)
            for ending in (GOOD[number % 3], BAD[number % 3])
        ]
        rows = self.own(rows) if spread else rows
        batch = Batch.from_sequences([p + r for p, r in rows], [[0] * len(p) + [1] * len(r) for p, r in rows])
        batch.sequences["labels"] = torch.arange(len(rows)) % 2 == 0
        return batch


def letter_share(sample) -> float:
    return sum("s" in piece for piece in sample.metadata["pieces"]) / max(len(sample.response_ids), 1)


def learn_online(task: Task, algorithm: BaseAlgorithm, actor: Actor) -> dict[str, float]:
    def score(sample) -> float:
        sample.metadata["pieces"] = task.tokenizer.convert_ids_to_tokens(sample.response_ids)
        return letter_share(sample)

    flow = actor.sample(n=8, max_tokens=24, temperature=1.0) >> RewardModel(score).score() >> algorithm.update()
    rewards = []
    for _ in range(ONLINE_STEPS):
        batch = Batch(prompts=task.own([Prompt(task.story(name), index=i) for i, name in enumerate(NAMES[:8])]))
        flow(batch)
        rewards.append(batch.metrics["rewards/mean"])
    return {"before": sum(rewards[:2]) / 2, "after": sum(rewards[-2:]) / 2}


def preference(task: Task, model: Actor | Critic) -> tuple[float, float]:
    """Margin and accuracy on held-out names: by log-probability, or by reward for a reward model."""
    batch = task.pairs(NAMES[8:], spread=False)
    if isinstance(model, Critic):
        append_value_tokens(batch)
        model.values(write="found").run(batch)
    else:
        model.logprobs(write="found").run(batch)
    sums = sum_over_tokens(batch, batch["found"])
    margins = sums[0::2] - sums[1::2]
    return float(margins.mean()), float((margins > 0).float().mean())


def learn_offline(task: Task, algorithm: OfflineAlgorithm, model: Actor | Critic) -> dict[str, float]:
    before, accuracy_before = preference(task, model)
    losses = []
    for _ in range(OFFLINE_STEPS):
        batch = task.pairs(NAMES[:8])
        if algorithm.name == "sft":  # imitate the happy endings only
            batch = batch.select(range(0, batch.num_sequences, 2))
        algorithm.update()(batch)
        losses.append(batch.metrics["loss/total"])
    after, accuracy_after = preference(task, model)
    return {
        "before": before,
        "after": after,
        "accuracy_before": accuracy_before,
        "accuracy_after": accuracy_after,
        "loss_before": losses[0],
        "loss_after": losses[-1],
    }


def learn(task: Task, name: str) -> dict[str, float]:
    kind, config = ALGORITHMS[name], SETTINGS.get(name, {})
    if name == "reward-model":
        critic = Critic(task.model, context=task.context, config=task.config)
        return learn_offline(task, kind(critic, **config), critic)
    actor = Actor(task.model, task.tokenizer, context=task.context, config=task.config)
    reference = None if issubclass(kind, PairwiseAlgorithm) and name in ("orpo", "simpo", "cpo") else Reference(actor)
    if issubclass(kind, OfflineAlgorithm):
        return learn_offline(task, kind(actor, reference, None, config), actor)
    critic = Critic(task.model, context=task.context, config=task.config) if name == "ppo" else None
    config = {"kl_coefficient": 0.0, **config}
    return learn_online(task, kind(actor, reference, critic, config), actor)


def main() -> None:
    task = Task(sys.argv[1], int(sys.argv[2]))
    for name in sys.argv[3:]:
        result = learn(task, name)
        if torch.distributed.get_rank() == 0:
            print("RESULT " + json.dumps({"algorithm": name, **result}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
