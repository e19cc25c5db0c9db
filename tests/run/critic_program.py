"""Test program on two ranks: critics of PPO runs at TP2 and PP2, saved and loaded again in every form.

Usage: critic_program.py FOLDER. Rank 0 prints JSON: for each run the values of a fixed batch by the critic as it is
after training, by what was saved, loaded in another layout, and by `transformers`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl import Actor, Callback, Critic, PPOTrainer
from megatron_rl.batch import Batch
from megatron_rl.dataflow import Stage
from megatron_rl.engines.conversion import convert
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.tracking import TrackerGroup
from megatron_rl.workers.actor_config import ActorConfig

ROWS = [[5, 6, 14, 7, 8, 15], [9, 14, 3, 15, 12], [4, 4, 14, 4, 15, 8, 2]]
QUIET = TrackerGroup.Config(trackers=())
PROMPTS = [{"prompt": f"{a}+{b}="} for a in range(10, 18) for b in range(10, 14)]
SHARED = ActorConfig(value_head=True)


def digits(sample) -> float:
    return sum(c in "02468" for c in sample.response_text) / 5


def values_of(stage: Stage) -> list[float]:
    batch = Batch.from_sequences(ROWS, [[1] * len(row) for row in ROWS])
    stage.run(batch)
    return batch["values"].tolist()


class Remember(Callback):
    """Keeps the values of the critic as it is in the job, after the last step."""

    def on_step_end(self, trainer, batch, metrics) -> None:
        self.stages = trainer.flow.stages

    def on_train_end(self, trainer) -> None:
        (stage,) = [stage for stage in self.stages if stage.name.endswith(".values")]
        self.values = values_of(stage)


def by_transformers(decoder: torch.nn.Module, score: Tensor) -> list[float]:
    """The value at a token is that of the prefix before it, 0 at the first."""
    found: list[float] = []
    with torch.no_grad():
        for row in ROWS:
            hidden = decoder(torch.tensor([row])).last_hidden_state[0]
            found += [0.0, *(hidden @ score[0]).tolist()[:-1]]
    return found


def train(folder: Path, output: Path, sizes: ParallelSizes, **options) -> list[float]:
    tokenizer, seen = AutoTokenizer.from_pretrained(folder / "model"), Remember()
    trainer = PPOTrainer(
        str(folder / "model"), tokenizer, PROMPTS, reward=digits, n=4, max_tokens=5, parallel=sizes, callbacks=[seen],
        **options,
    )  # fmt: skip
    trainer.train(1, 16 // (2 // (sizes.tp * sizes.pp)), 1e-2, str(output), max_steps=4, tracking=QUIET)
    return seen.values


def own_critic(folder: Path) -> dict[str, list[float]]:
    output = folder / "own"
    found = {"trained": train(folder, output, ParallelSizes(tp=2))}
    classifier = AutoModelForSequenceClassification.from_pretrained(output / "hf_critic", dtype=torch.float32)
    assert classifier.num_labels == 1
    AutoTokenizer.from_pretrained(output / "hf_critic")
    found["transformers"] = by_transformers(classifier.model, classifier.score.weight)
    ParallelContext.forget()
    found["reloaded at PP2"] = values_of(Critic(str(output / "hf_critic"), parallel=ParallelSizes(pp=2)).values())
    ParallelContext.forget()
    return found


def shared_critic(folder: Path) -> dict[str, list[float]]:
    output, tokenizer = folder / "shared", AutoTokenizer.from_pretrained(folder / "model")
    found = {"trained": train(folder, output, ParallelSizes(pp=2), shared_critic=True)}
    checkpoint = str(output / "checkpoints" / "step_000004")
    AutoModelForCausalLM.from_pretrained(output / "hf")
    classifier = AutoModelForSequenceClassification.from_pretrained(output / "hf", num_labels=1, dtype=torch.float32)
    state = load_file(output / "hf" / "value_head" / "model.safetensors")
    classifier.load_state_dict(state, strict=False)
    head = state["score.weight"]
    found["transformers"] = by_transformers(classifier.model, classifier.score.weight)
    ParallelContext.forget()
    two = ParallelSizes(tp=2)
    for name, source in {"folder": str(output / "hf"), "checkpoint": checkpoint}.items():
        actor = Actor(source, tokenizer, parallel=two, config=SHARED)
        found[f"actor from {name} at TP2"] = values_of(actor.values())
        found[f"critic from {name} at TP2"] = values_of(Critic(source, parallel=two).values())
    actor.save_pretrained(folder / "again")
    ParallelContext.forget()
    convert(checkpoint, folder / "converted", "hf")
    ParallelContext.forget()
    convert(output / "hf", folder / "megatron", "megatron", ParallelSizes(pp=2))
    ParallelContext.forget()
    convert(folder / "megatron", folder / "back", "hf")
    ParallelContext.forget()
    for place in ("again", "converted", "back"):
        weight = load_file(folder / place / "value_head" / "model.safetensors")["score.weight"]
        assert torch.equal(weight, head), place
    return found


if __name__ == "__main__":
    work = Path(sys.argv[1])
    result = {"own": own_critic(work), "shared": shared_critic(work)}
    if torch.distributed.get_rank() == 0:
        print("RESULT " + json.dumps(result), flush=True)
    torch.distributed.destroy_process_group()
