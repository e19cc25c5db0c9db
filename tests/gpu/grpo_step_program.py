"""One GRPO step of a small fp32 model on fixed samples, then greedy answers of the new weights: to be compared between
devices. One JSON object on the last line.

    python tests/gpu/grpo_step_program.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
from small_run import write_run

# isort: split
import torch
from transformers import AutoTokenizer

from megatron_rl.algorithms import GRPO
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.devices import current_platform
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.workers import Actor, Reference

VOCAB = 16


def samples() -> list[Sample]:
    """Eight groups of four samples of unequal length, fixed by a seed."""
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    made = []
    for group in range(8):
        prompt = Prompt(draw(4 + group % 3), index=group)
        for _ in range(4):
            response = draw(2 + len(made) % 6)
            logprobs = (-2.8 - 0.1 * torch.rand(len(response), generator=generator)).tolist()
            made.append(Sample(prompt, response, logprobs, group=group, reward=len(made) % 5 / 4))
    return made


def update(algorithm: GRPO) -> dict[str, float]:
    batch = Batch(samples=samples())
    batch.sequences["rewards"] = torch.tensor([sample.reward for sample in batch.samples])
    algorithm.update()(batch)
    return batch.metrics


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_run(folder)
    model = str(folder / "model")
    config = Actor.Config(optimizer=OptimizerConfig(optimizer="sgd", learning_rate=0.1, clip_gradient=0.0))
    actor = Actor(model, AutoTokenizer.from_pretrained(model), config=config)
    place = current_platform()
    place.reset_peak_memory()
    algorithm = GRPO(actor, Reference(actor), kl_coefficient=0.05, num_mini_batches=1, old_logprobs="rollout")
    first, second = update(algorithm), update(algorithm)
    answers = actor.generate([sample.prompt for sample in samples()[::4]], n=1, temperature=0.0, max_tokens=8)
    logprobs = [value for answer in answers for value in answer.rollout_logprobs]
    result = {
        "device": place.name,
        "loss": first["loss/total"],
        "gradient_norm": first["optimizer/gradient_norm"],
        "loss_after": second["loss/total"],
        "greedy_logprob": sum(logprobs) / len(logprobs),
        "peak_mib": round(place.peak_memory_bytes() / 2**20, 1),
    }
    print(json.dumps(result))
    actor.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
