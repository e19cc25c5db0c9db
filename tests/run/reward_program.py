"""Test program under torchrun: trains a reward model, exports it, and scores samples with the folder in three ways.

Usage: reward_program.py FOLDER TP PAD. Rank 0 prints JSON: metrics of the first and last step, and the scores of
`transformers` and of `RewardModel(folder)`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import megatron_rl  # noqa: F401  (first: the CPU face)
from megatron_rl import RewardModel, RewardTrainer
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.parallel import ParallelSizes
from megatron_rl.tracking import TrackerGroup, read_metrics


def pairs() -> list[dict[str, object]]:
    sums = [(a, b) for a in range(10, 22) for b in range(10, 14)]
    return [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 7), "gap": 0.5 if a % 2 else 0.0}
        for a, b in sums
    ]


def samples(tokenizer) -> list[Sample]:
    """Some end with EOS, one ends with two of it, one is cut off."""
    made = []
    for index, (text, ends) in enumerate([("21", 1), ("4", 0), ("123", 2), ("", 1)]):
        prompt = tokenizer.encode(f"1{index}+11=")
        response = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * ends
        made.append(Sample(Prompt(prompt, index=index), response, [0.0] * len(response)))
    return made


def scores_of_transformers(folder: Path, rows: list[Sample]) -> list[float]:
    """Padded on the right into one batch, as users do."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert model.num_labels == 1
    ids = [torch.tensor(row.prompt.token_ids + row.response_ids) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=model.config.pad_token_id)
    mask = torch.arange(padded.shape[1]) < torch.tensor([[len(row)] for row in ids])
    with torch.no_grad():
        return model(padded, attention_mask=mask.long()).logits.squeeze(-1).tolist()


def main(folder: Path, tp: int, pad: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if pad == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    trainer = RewardTrainer(
        str(folder / "model"), tokenizer, pairs(), margin="gap", parallel=ParallelSizes(tp=tp), max_length=32
    )
    output = folder / f"out_{tp}_{pad}"
    trainer.train(1, 16, 3e-3, str(output), max_steps=12, tracking=TrackerGroup.Config(trackers=("jsonl",)))
    rows = samples(tokenizer)
    batch = Batch(samples=rows)
    RewardModel(str(output / "hf")).score().run(batch)
    again = RewardTrainer(str(output / "hf"), tokenizer, pairs(), parallel=ParallelSizes(tp=tp), center_coefficient=0.1)
    rate = 0.0  # nothing moves: the metrics are those of the folder
    last = again.train(1, 48, rate, str(output) + "_again", max_steps=1, tracking=TrackerGroup.Config(trackers=()))
    if torch.distributed.get_rank() == 0:
        found = read_metrics(output / "metrics.jsonl")
        result = {
            "first": found[1],
            "last": found[max(found)],
            "reloaded": last,
            "ours": batch["rewards"].tolist(),
            "theirs": scores_of_transformers(output / "hf", rows),
        }
        print("RESULT " + json.dumps(result), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
