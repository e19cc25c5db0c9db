"""Peak memory of one colocated GRPO step on 8,192-token sequences: one JSON object on the last line.

The same model (46M parameters of a Llama, fp32, TP2 x PP2 on four processes), the same prompt and step, twice, each in
fresh processes. `ours`: the engine sleeps while the trainer works, and weights are resharded under the default staging
cap. `baseline`: weights are gathered parameter by parameter and sliced, as slime and verl do, and the engine keeps its
copy throughout. Rollouts run TP1 on every rank; activations are recomputed in both. ``ours_mb`` and ``baseline_mb``:
growth of the resident set of the worst rank over what it was when the process group stood and no model was built, so
without the interpreter and its libraries; ``*_rss_mb`` are the whole resident sets. ``phases`` shows the peak of the
worst rank in each phase, in MB.

    make bench-memory
    python tools/bench_memory.py [--tokens 8192]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from reshard_ways import Gathered
from torch import Tensor

from megatron_rl import GRPO, Actor, RewardModel
from megatron_rl.batch import Batch, Prompt
from megatron_rl.devices import current_platform
from megatron_rl.engines.megatron.model.builder import build_model, transformer_config
from megatron_rl.models import Architecture
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.workers.actor_config import RolloutConfig

WORLD, MIB, RESPONSE, SAMPLES = 4, 1 << 20, 64, 2
SIZES = ParallelSizes(tp=2, pp=2)
ARCHITECTURE = Architecture("llama", 4, 512, 1536, 8, 4, 64, 32768, tied=False, max_positions=8192)
WAYS = ("ours", "baseline")


class NoText:
    """All that is asked of a tokenizer here: the prompt is made of token ids."""

    pad_token_id = eos_token_id = bos_token_id = 0
    pad_token = eos_token = "0"

    def __len__(self) -> int:
        return ARCHITECTURE.vocab

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return " ".join(map(str, token_ids))


class GatheredSync:
    """In place of `WeightSync`."""

    def __init__(self, actor: Actor) -> None:
        self._engine = actor.rollouts.engine
        model, into = actor.engine, self._engine.targets()
        self._way = Gathered(
            actor.context, model.layout, self._engine.layout, model.tensors(), into, torch.float32, keep_buffers=False
        )

    def push(self, tensors: dict[str, Tensor], version: int) -> Any:
        self._engine.begin_update()
        self._way.run()
        self._engine.commit_update(version)
        return SimpleNamespace(transfer=SimpleNamespace(sent_bytes=self._way.received_bytes))


def peaks_of(way: str, tokens: int) -> dict[str, float]:
    """Peak resident MB of the worst rank: before there is a model, and in each phase of a step after a first one."""
    platform = current_platform()
    platform.init_process_group(timeout=900)
    context = ParallelContext.create(SIZES, timeout=900, seed=1)
    platform.reset_peak_memory()
    peaks = {"before": platform.peak_memory_bytes()}
    config = transformer_config(ARCHITECTURE, SIZES, dtype=torch.float32, recompute=True)
    chunks = build_model(ARCHITECTURE, config, pg_collection=context.collection)
    rollout = RolloutConfig(sleep_while_training=way == "ours")
    config = Actor.Config(token_budget=tokens, recompute=True, rollout=rollout)
    actor = Actor(chunks, NoText(), context=context, config=config)
    if way == "baseline":
        actor.rollouts.weights._sync = GatheredSync(actor)  # type: ignore[assignment]
    reward = RewardModel(lambda sample: float(sample.response_ids[0] % 7))
    stages = {
        "rollout": actor.sample(n=SAMPLES, max_tokens=RESPONSE, ignore_eos=True) >> reward.score(),
        "training": GRPO(actor, None, num_mini_batches=1).update(),
    }
    ids = torch.randint(1, ARCHITECTURE.vocab, (tokens - RESPONSE,), generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # the second step has optimizer states, and weights of an earlier version to replace
        batch = Batch(prompts=[Prompt(ids.tolist(), index=0)])
        for name, flow in stages.items():
            platform.reset_peak_memory()
            flow(batch)
            peaks[name] = platform.peak_memory_bytes()
    worst = torch.tensor(list(peaks.values()), dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    actor.close()
    return {name: round(value / MIB, 1) for name, value in zip(peaks, worst.tolist(), strict=True)}


def measure(way: str, tokens: int) -> dict[str, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    # Freed tensors go back to the system at once, so that the resident set is what is in use.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONWARNINGS": "ignore"}
    command += [__file__, "--only", way, "--tokens", str(tokens)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=1800, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(way, json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=WAYS, help="measure this way in the processes that torchrun has started")
    parser.add_argument("--tokens", type=int, default=8192, help="of each sequence")
    arguments = parser.parse_args()
    if arguments.only:
        peaks = peaks_of(arguments.only, arguments.tokens)
        if dist.get_rank() == 0:
            print(json.dumps(peaks), flush=True)
        dist.destroy_process_group()
        return
    phases = {way: measure(way, arguments.tokens) for way in WAYS}
    whole = {way: max(found["rollout"], found["training"]) for way, found in phases.items()}
    grown = {way: whole[way] - phases[way]["before"] for way in WAYS}
    figures: dict[str, Any] = {f"{way}_mb": round(grown[way], 1) for way in WAYS}
    figures["ratio"] = round(grown["ours"] / grown["baseline"], 3)
    figures |= {f"{way}_rss_mb": whole[way] for way in WAYS} | {"phases": phases, "tokens": arguments.tokens}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
