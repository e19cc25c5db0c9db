"""One participant of `bench_dpo.py`: DPO by megatron_rl in one process.

python tools/pairs_ours.py MODEL_FOLDER [field=value of Actor.Config ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import yaml
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

from megatron_rl import DPO, Actor, Reference
from megatron_rl.data import PairDataset
from megatron_rl.data.preferences import PairLoader
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.models.tokenizer import load_tokenizer


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    overrides = {name: yaml.safe_load(value) for name, value in (a.split("=") for a in sys.argv[2:])}
    tokenizer = load_tokenizer(folder)
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], clip_gradient=CLIP_GRADIENT, weight_decay=0.0
    )
    config = Actor.Config.parse({"optimizer": optimizer} | overrides, "command line")
    actor = Actor(folder, tokenizer, config=config)
    dpo = DPO(actor, Reference(actor), beta=BETA)
    flow = dpo.update()
    pairs = PairDataset(read_pairs(), tokenizer, PairDataset.Config(max_length=2048))
    loader = PairLoader(pairs, BATCH, 0, 1, shuffle=False)
    at_start = peak_rss_mb()
    while wait_for_turn():
        cpu, start = time.process_time(), time.perf_counter()
        batch = loader.next_batch()
        tokens = batch.num_tokens
        flow(batch)
        seconds = {"total": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        memory = {"peak_rss_mb": peak_rss_mb(), "start_rss_mb": at_start}
        report({"tokens": tokens, "margin": batch.metrics["rewards/margins"], "seconds": seconds} | memory)
    actor.close()


if __name__ == "__main__":
    main()
