"""One participant of `bench_dpo.py`: the same by TRL's DPOTrainer. Runs where TRL is installed.

python tools/pairs_trl.py MODEL_FOLDER [PAIRS_OF_A_MICRO_BATCH]
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from pairs_task import (
    BATCH,
    BETA,
    BETAS,
    CLIP_GRADIENT,
    LEARNING_RATE,
    peak_rss_mb,
    read_pairs,
    report,
    wait_for_turn,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Pace(TrainerCallback):
    """Starts a step when told to, and reports it; the batch has been put together by then."""

    trainer: DPOTrainer
    tokens = 0.0  # seen so far
    at_start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.at_start = self.at_start or peak_rss_mb()
        if not wait_for_turn():
            sys.exit(0)
        self.cpu, self.start = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = {"total": time.perf_counter() - self.start, "cpu": time.process_time() - self.cpu}
        metrics = self.trainer._metrics["train"]
        tokens, self.tokens = metrics["num_tokens"][-1] - self.tokens, metrics["num_tokens"][-1]
        memory = {"peak_rss_mb": peak_rss_mb(), "start_rss_mb": self.at_start}
        report({"tokens": tokens, "margin": metrics["rewards/margins"][-1], "seconds": seconds} | memory)


def main() -> None:
    torch.set_num_threads(1)
    folder = sys.argv[1]
    micro_batch = int(sys.argv[2]) if len(sys.argv) > 2 else BATCH
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=BATCH // micro_batch,
        train_sampling_strategy="sequential",
        max_length=2048,
        max_steps=10_000,
        learning_rate=LEARNING_RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP_GRADIENT,
        lr_scheduler_type="constant",
        beta=BETA,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    pace = Pace()
    pace.trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(read_pairs()),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[pace],
    )
    pace.trainer.train()


if __name__ == "__main__":
    main()
