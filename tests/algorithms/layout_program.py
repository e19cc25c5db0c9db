"""Test program of several ranks: one update of every algorithm on the real workers, for each layout named.

Prints one JSON line per layout: algorithm -> metrics. Usage: layout_program.py MODEL LAYOUT [LAYOUT ...]
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoTokenizer

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl.algorithms import ALGORITHMS
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.devices import current_platform
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers import Actor, Critic, Reference

PADDED = {"packing": False, "micro_batch_size": 4}
LAYOUTS: dict[str, tuple[dict, dict]] = {  # of `ParallelSizes`, of `Actor.Config`
    "one": ({}, {}),
    "one_padded": ({}, PADDED),
    "tp2": ({"tp": 2}, {}),
    "tp2_sp": ({"tp": 2, "sequence_parallel": True}, {}),
    "cp2": ({"cp": 2}, {}),
    "dp2": ({}, {}),
    "pp2": ({"pp": 2}, {}),
    "pp2vpp2": ({"pp": 2, "vpp": 2}, {}),
    "tp2pp2": ({"tp": 2, "pp": 2}, {}),
}
SEVERAL = {"num_epochs": 2, "num_mini_batches": 2}  # so that ratios leave 1 and clips bite
ONLINE: dict[str, dict] = {
    "grpo": {"correction": {"level": "geometric", "lower": 0.5, "veto": 1e-9}},
    "grpo kept": {
        "correction": {
            "level": "token",
            "normalize": True,
            "reject": "token",
            "reject_lower": 0.0,
            "reject_upper": 1e6,
            "denominators": "kept",
        }
    },
    "dr-grpo": {"norm_length": 16},
    "dapo": {"normalize_std": "batch", "normalize_advantages": True, "overlong_tokens": 12, "overlong_cache": 6},
    "gspo": {"kl_coefficient": 0.05, "entropy_coefficient": 0.01, "clip_low": 0.01, "clip_high": 0.01, **SEVERAL},
    "gmpo": SEVERAL,
    "cispo": SEVERAL,
    "sapo": SEVERAL,
    "rloo": {"clip_low": 0.01, "clip_high": 0.01, **SEVERAL},
    "opo": {"loss_aggregation": "token-sum"},
    "reinforce++": {},
    "reinforce++-baseline": {},
    "ppo": {"kl_target": 1.0, **SEVERAL},
}
PAIRED: dict[str, dict] = {
    "dpo": {"loss": {"sigmoid": 1.0, "sft": 0.3, "ipo": 0.01}, **SEVERAL},
    "dpo aot": {"loss": {"aot": 0.7, "aot_unpaired": 0.3}, "ld_alpha": 0.5},
    "dpo js": {"f_divergence": "js"},
    "orpo": {},
    "simpo": {},
    "cpo": {},
    "reward-model": {"center_coefficient": 0.01},
}
LABELLED: dict[str, dict] = {"kto": {}, "bco": {}}
TEMPERATURE = 0.9


def token_rows(count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Prompts and responses of unequal lengths, fixed by the seed."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 512, (size,), generator=generator).tolist()

    return [(tokens(2, 6), tokens(1, 14)) for _ in range(count)]


def share(rows: list, context) -> list:
    size = len(rows) // context.grid.dp
    return rows[context.coordinates.dp * size : (context.coordinates.dp + 1) * size]


def sampled_batch(context) -> Batch:
    """12 samples of 4 prompts; the rollout engine's log-probabilities are near the policy's, the rewards arbitrary."""
    samples = []
    for index, (prompt, response) in enumerate(token_rows(12, 11)):
        mask = [0 if len(response) > 6 and 2 <= t < 4 else 1 for t in range(len(response))]
        logprobs = [-12.0 + 0.1 * (t % 3) for t in range(len(response))]
        reward = (index * 7 % 5) / 4.0
        samples.append(Sample(Prompt(prompt), response, logprobs, response_mask=mask, group=index // 3, reward=reward))
    batch = Batch(samples=share(samples, context), temperature=TEMPERATURE)
    batch.sequences["rewards"] = torch.tensor([sample.reward for sample in batch.samples])
    return batch


def fixed_batch(context) -> Batch:
    """8 sequences: 4 preference pairs, or 8 labelled responses."""
    rows = share(token_rows(8, 23), context)
    batch = Batch.from_sequences([p + r for p, r in rows], [[0] * len(p) + [1] * len(r) for p, r in rows])
    batch.sequences["labels"] = torch.tensor([index % 2 == 0 for index in range(len(rows))])
    return batch


def run_layout(model: str, layout: str) -> dict[str, dict[str, float]]:
    sgd = OptimizerConfig(optimizer="sgd", learning_rate=1e-4, clip_gradient=0.0)
    sizes, overrides = LAYOUTS[layout]
    config = Actor.Config(optimizer=sgd, token_budget=96, **overrides)
    actor = Actor(model, AutoTokenizer.from_pretrained(model), parallel=ParallelSizes(**sizes), config=config)
    reference = Reference(actor)
    critic = Critic(model, context=actor.context, config=config)
    found = {}
    for name, options in (ONLINE | PAIRED | LABELLED | {"sft": {}}).items():
        kind = ALGORITHMS[name.split()[0]]
        algorithm = kind(critic, **options) if name == "reward-model" else kind(actor, reference, critic, options)
        batches = [sampled_batch(actor.context) if name in ONLINE else fixed_batch(actor.context) for _ in range(2)]
        for batch in batches:
            algorithm.update()(batch)
        found[name] = {key: value for key, value in batches[-1].metrics.items() if not key.startswith("time/")}
    return found


def main() -> None:
    current_platform().init_process_group(timeout=120)
    for layout in sys.argv[2:]:
        result = run_layout(sys.argv[1], layout)
        ParallelContext.forget()
        if torch.distributed.get_rank() == 0:
            print("RESULT " + json.dumps({"layout": layout, "metrics": result}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
