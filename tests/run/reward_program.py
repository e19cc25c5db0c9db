"""Test program of several ranks: trains a reward model, exports it, and computes rewards with it in every way.

Usage: reward_program.py FOLDER TP PP PAD [CHECKPOINT]. Rank 0 prints JSON: metrics of the first and last step, rewards
of `transformers`, and those of `RewardModel` of the exported folder, the run's Megatron checkpoint, a job's own chunks,
and CHECKPOINT, which another layout wrote (with `transformers`' rewards of the folder beside it).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_rl import Critic, RewardModel, RewardTrainer
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.parallel import ParallelSizes
from megatron_rl.tracking import TrackerGroup, read_metrics

from megatron.core import parallel_state  # isort: skip  (after megatron_rl, which gives it its CPU face)


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


def rewards_of_transformers(folder: Path, rows: list[Sample]) -> list[float]:
    """Padded on the right into one batch, as users do."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert model.num_labels == 1
    ids = [torch.tensor(row.prompt.token_ids + row.response_ids) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=model.config.pad_token_id)
    mask = torch.arange(padded.shape[1]) < torch.tensor([[len(row)] for row in ids])
    with torch.no_grad():
        return model(padded, attention_mask=mask.long()).logits.squeeze(-1).tolist()


def rewards_of(model: RewardModel, rows: list[Sample]) -> list[float]:
    batch = Batch(samples=rows)
    model.score().run(batch)
    return batch["rewards"].tolist()


def ways(output: Path, tokenizer, rows: list[Sample]) -> dict[str, list[float]]:
    """The trained model from a folder, from a checkpoint, and as the chunks of a job that has its own."""
    chunks = Critic(str(output / "hf"), tokenizer, parallel_state=parallel_state).engine.chunks
    own = {"tokenizer": tokenizer, "parallel_state": parallel_state}
    return {
        "folder": rewards_of(RewardModel(str(output / "hf")), rows),
        "checkpoint": rewards_of(RewardModel(str(output / "checkpoints" / "step_000012")), rows),
        "chunks": rewards_of(RewardModel(model=chunks, **own), rows),
    }


def main(folder: Path, tp: int, pp: int, pad: str, checkpoint: str | None = None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if pad == "eos":
        tokenizer.pad_token = tokenizer.eos_token
    model, sizes = str(folder / "model"), ParallelSizes(tp=tp, pp=pp)
    trainer = RewardTrainer(model, tokenizer, pairs(), margin="gap", parallel=sizes, max_length=32)
    output = folder / f"out_{tp}_{pp}_{pad}"
    trainer.train(1, 16, 3e-3, str(output), max_steps=12, tracking=TrackerGroup.Config(trackers=("jsonl",)))
    rows = samples(tokenizer)
    ours = ways(output, tokenizer, rows)
    again = RewardTrainer(str(output / "hf"), tokenizer, pairs(), parallel=sizes, center_coefficient=0.1)
    rate = 0.0  # nothing moves: the metrics are those of the folder
    last = again.train(1, 48, rate, str(output) + "_again", max_steps=1, tracking=TrackerGroup.Config(trackers=()))
    theirs = dict.fromkeys(ours, output)
    if checkpoint is not None:
        ours["another layout"] = rewards_of(RewardModel(checkpoint), rows)
        theirs["another layout"] = Path(checkpoint).parents[1]
    if torch.distributed.get_rank() == 0:
        found = read_metrics(output / "metrics.jsonl")
        result = {
            "first": found[1],
            "last": found[max(found)],
            "reloaded": last,
            "checkpoint": str(output / "checkpoints" / "step_000012"),
            "ours": ours,
            "theirs": {way: rewards_of_transformers(place / "hf", rows) for way, place in theirs.items()},
        }
        print("RESULT " + json.dumps(result), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
