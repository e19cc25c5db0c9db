"""One participant of `bench_train.py`: the stories task by TRL's GRPOTrainer. Runs where TRL is installed."""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from stories_task import (
    BETAS,
    CLIP_GRADIENT,
    KL,
    LEARNING_RATE,
    MAX_TOKENS,
    PROMPTS,
    SAMPLES,
    find_model,
    peak_rss_mb,
    report,
    reward,
    wait_for_turn,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def score(completions: list[str], hero: list[str], **_: Any) -> list[float]:
    return [reward(text, name) for text, name in zip(completions, hero, strict=True)]


class Pace(TrainerCallback):
    """Starts a step when told to, and reports it: from before generation to after the optimizer."""

    trainer: GRPOTrainer
    tokens = 0  # seen so far

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not wait_for_turn():
            sys.exit(0)
        self.cpu, self.start = time.process_time(), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seconds = {"total": time.perf_counter() - self.start, "cpu": time.process_time() - self.cpu}
        metrics = self.trainer._metrics["train"]
        tokens, self.tokens = metrics["num_tokens"][-1] - self.tokens, metrics["num_tokens"][-1]
        record = {"tokens": tokens, "peak_rss_mb": peak_rss_mb(), "reward": metrics["reward"][-1]}
        report(record | {"seconds": seconds})


def main() -> None:
    torch.set_num_threads(1)
    folder = find_model()
    rows = len(PROMPTS) * SAMPLES
    micro_batch = int(sys.argv[1]) if len(sys.argv) > 1 else rows
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=rows // micro_batch,
        num_generations=SAMPLES,
        max_completion_length=MAX_TOKENS,
        max_steps=10_000,
        learning_rate=LEARNING_RATE,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP_GRADIENT,
        lr_scheduler_type="constant",
        beta=KL,
        loss_type="dapo",  # the mean over all tokens, as the other side
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        bf16=False,
        gradient_checkpointing=False,
        use_vllm=False,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    pace = Pace()
    pace.trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=score,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text, "hero": name} for text, name in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[pace],
    )
    pace.trainer.train()


if __name__ == "__main__":
    main()
