"""Test program: data-parallel steps over the library and over hybrid groups; arguments: jobs, else the small ones.

Prints the metrics of each way as a JSON line, and the median seconds of a step as another. Two ranks have only one
order of a sum, so there all ways must agree to the bit.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

import megatron_rl  # noqa: F401  (first: the CPU face)

sys.path.insert(0, str(Path(__file__).parents[1] / "megatron_lm"))
from job import JobArguments, build, initialize
from megatron.core import parallel_state

from megatron_rl.algorithms import GRPO
from megatron_rl.collectives import HybridProcessGroup
from megatron_rl.devices import current_platform
from megatron_rl.run.doctor.random_data import NumberTokenizer, sampled_batch
from megatron_rl.workers import Actor

SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
JOBS = {
    "plain": JobArguments(lr=0.1),
    "sharded": replace(JobArguments(lr=0.1), **SHARDED),
    "wide": JobArguments(lr=0.01, hidden_size=256, ffn_hidden_size=512),  # 10 MB of gradients
}
STEPS = {"wide": 5}
WAYS = {
    "library": {},
    "hybrid": {"all_reduce": "hybrid", "reuse_calibration": False},
    "deterministic": {"all_reduce": "hybrid", "deterministic": True, "chunk_mb": 0.01},
    "large pieces": {"all_reduce": "hybrid", "deterministic": True},
}


def steps(job_name: str, way: str) -> tuple[list[dict[str, float]], float]:
    """Metrics of each step, and the median seconds of a step."""
    initialize(JOBS[job_name])
    job = build(JOBS[job_name])
    actor = Actor(
        job.model,
        NumberTokenizer(),
        job.optimizer,
        parallel_state,
        config={"collectives": WAYS[way], "compare_with_export": False},
    )
    groups = [
        getattr(group, name)
        for group in actor.engine.chunks[0].bucket_groups
        for name in ("data_parallel_group", "intra_distributed_optimizer_instance_group")
        if hasattr(group, name)
    ]
    assert all(isinstance(group, HybridProcessGroup) == (way != "library") for group in groups)
    grpo, results, seconds = GRPO(actor, old_logprobs="recompute"), [], []
    for _ in range(STEPS.get(job_name, 3)):
        batch = sampled_batch(actor.context)
        dist.barrier()
        started = time.perf_counter()
        grpo.update()(batch)
        seconds.append(time.perf_counter() - started)
        results.append({name: v for name, v in batch.metrics.items() if name.startswith(("loss/", "optimizer/"))})
    return results, statistics.median(seconds)


if __name__ == "__main__":
    current_platform().init_process_group(300)
    for job_name in sys.argv[1:] or ("plain", "sharded"):
        for way in WAYS:
            found, seconds = steps(job_name, way)
            if dist.get_rank() == 0:
                print("RESULT " + json.dumps([job_name, way, found]), flush=True)
                print("SECONDS " + json.dumps([way, seconds]), flush=True)
            parallel_state.destroy_model_parallel()
    dist.barrier()
    dist.destroy_process_group()
