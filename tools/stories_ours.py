"""One participant of `bench_train.py`: the stories task by megatron_rl, in one process or in several under torchrun.

python tools/stories_ours.py [tp=1] [field=value of Actor.Config ...]
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
import yaml
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

from megatron_rl import GRPO, Actor, Reference, RewardModel
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.dataflow import Flow
from megatron_rl.engines.engine_config import OptimizerConfig
from megatron_rl.models.tokenizer import load_tokenizer
from megatron_rl.parallel import ParallelSizes


def score(sample: Sample) -> float:
    return reward(sample.response_text, sample.prompt.answer)


def build(tp: int, overrides: dict[str, object]) -> tuple[Actor, list[Prompt], Flow]:
    """The actor, its prompts and the flow of one step."""
    folder = find_model()
    tokenizer = load_tokenizer(folder)
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], clip_gradient=CLIP_GRADIENT
    )
    config = Actor.Config.parse({"optimizer": optimizer} | overrides, "command line")
    actor = Actor(folder, tokenizer, parallel=ParallelSizes(tp=tp), config=config)
    grpo = GRPO(actor, Reference(actor), kl_coefficient=KL, loss_aggregation="token-mean")
    prompts = [
        Prompt(tokenizer(text).input_ids, text, index=index, answer=name) for index, (text, name) in enumerate(PROMPTS)
    ]
    return actor, prompts, actor.sample(n=SAMPLES, max_tokens=MAX_TOKENS) >> RewardModel(score).score() >> grpo.update()


def split(metrics: dict[str, float]) -> dict[str, float]:
    """Seconds of a step by kind of work."""
    seconds = {name[5:-2]: value for name, value in metrics.items() if name.startswith("time/")}
    sync = seconds.pop("weight_sync", 0.0)
    parts = {"rollout": seconds.pop("actor.sample") - sync, "reward": seconds.pop("reward.score"), "weight_sync": sync}
    parts["logprob"] = sum(seconds.pop(name) for name in [name for name in seconds if name.endswith(".logprobs")])
    return parts | {"update": sum(seconds.values())}


def main() -> None:
    torch.set_num_threads(1)
    arguments = {"tp": 1} | {name: yaml.safe_load(value) for name, value in (a.split("=") for a in sys.argv[1:])}
    actor, prompts, flow = build(arguments.pop("tp"), arguments)
    rank, several = actor.context.rank, actor.context.world_size > 1
    while True:
        going = torch.tensor(rank == 0 and wait_for_turn())
        if several:
            dist.broadcast(going, 0)
        if not going:
            break
        batch, cpu, start = Batch(prompts=prompts), time.process_time(), time.perf_counter()
        flow(batch)
        seconds = {"total": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        ranks = actor.context.gather_objects({"peak_rss_mb": peak_rss_mb(), "cpu": seconds["cpu"]})
        if rank == 0:
            peak = max(figures["peak_rss_mb"] for figures in ranks)
            record = {"tokens": batch.num_tokens, "peak_rss_mb": peak, "reward": batch.metrics["rewards/mean"]}
            report(record | {"seconds": seconds | split(batch.metrics)})
    actor.close()


if __name__ == "__main__":
    main()
