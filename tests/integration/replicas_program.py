"""Two rollout replicas of TP ranks each, whose first ranks start a real server each; run by torchrun on 2*TP ranks.

Generate, push, generate: the trainer holds the weights as Megatron would, cut over all ranks; each replica answers its
share of the prompts. Prints one line for each version.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from integration.delivery_program import PADDED, TOLERANCE, logical, model_of
from rollout.rollout_models import architecture_of
from transformers import PreTrainedModel

from megatron_rl.models import hf_layout, megatron_layout, rollout_layout
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard import P2PTransport
from megatron_rl.rollout import Completion, RolloutPlacement, SamplingParams, SGLangEngine
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.source import in_memory
from megatron_rl.weights.sync import WeightSync

PROMPTS = [[5, 9, 11, 40 + i, 3] for i in range(7)]


def error_of(model: PreTrainedModel, prompt: list[int], completion: Completion) -> float:
    """Largest error of a token's log-probability against transformers in bf16."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion.token_ids])).logits[0].float()
    expected = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    expected = expected.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    return float((torch.tensor(completion.logprobs) - expected).abs().max())


def main() -> None:
    python, tp, world, rank = sys.argv[1], int(sys.argv[2]), int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    models = {version: model_of("llama", version) for version in (1, 2)}
    weights = {version: logical(model) for version, model in models.items()}
    dist.init_process_group("gloo", timeout=timedelta(seconds=500))
    architecture = architecture_of(models[1].config)
    placement = RolloutPlacement(tuple(range(world)), tp)
    groups = [dist.new_group(list(ranks)) for ranks in placement.replicas]
    replica = placement.replica(rank)
    source = megatron_layout(architecture, RankGrid(ParallelSizes(tp=2, pp=world // 2), world), PADDED)
    with SGLangEngine(
        architecture,
        rollout_layout(architecture, tp, placement.replicas),
        rank,
        torch.bfloat16,
        tp_group=groups[replica] if tp > 1 else None,
        max_running=8,
        server={"python": python, "context_length": 512, "max_total_tokens": 4096},
    ) as engine:
        sync = WeightSync(source, engine, rank, P2PTransport(), torch.bfloat16)
        for version, model in models.items():
            start = time.perf_counter()
            tensors = empty_tensors(source, rank, torch.float32)
            fill(source, rank, tensors, in_memory(weights[version], hf_layout(architecture)))
            sync.push(tensors, version)
            pushed = time.perf_counter() - start
            mine = placement.share(len(PROMPTS), replica)
            answers = engine.generate([PROMPTS[i] for i in mine], SamplingParams(n=2, max_tokens=12, ignore_eos=True))
            checked = engine.verify_weights()
            shares: list = [None] * world
            told = (answers, engine.urls, checked) if placement.tp_rank(rank) == 0 else None
            dist.all_gather_object(shares, told)
            if rank == 0:
                report(model.bfloat16(), version, placement, [share for share in shares if share is not None], pushed)
    dist.barrier()
    dist.destroy_process_group()


def report(model: PreTrainedModel, version: int, placement: RolloutPlacement, shares: list, pushed: float) -> None:
    parts = {index: placement.share(len(PROMPTS), index) for index in range(len(shares))}
    merged: list = [None] * len(PROMPTS)
    for index, (answers, _, _) in enumerate(shares):
        for prompt, group in zip(parts[index], answers, strict=True):
            merged[prompt] = group
    assert [len(group) for group in merged] == [2] * len(PROMPTS)
    assert all(c.policy_version_spans == [(version, 12)] for group in merged for c in group)
    assert len({url for _, urls, _ in shares for url in urls}) == 2, "each replica has a server of its own"
    assert all(check.compared == 1 and not check.faults for _, _, check in shares)
    worst = max(error_of(model, prompt, c) for prompt, group in zip(PROMPTS, merged, strict=True) for c in group)
    assert worst <= TOLERANCE, worst
    print(f"ok version {version}: pushed in {pushed:.1f} s, log-probabilities within {worst:.4f}", flush=True)


if __name__ == "__main__":
    main()
