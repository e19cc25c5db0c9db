"""Our engine's client against SGLang's own benchmark client: the same number of equal requests to one real server.

For `bench_rollout.py`. Rounds alternate, so that what else the machine does disturbs both alike; the server's prefix
cache is off, so that no round profits from another.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from megatron_rl.models import rollout_layout
from megatron_rl.rollout import SamplingParams, SGLangEngine
from megatron_rl.rollout.sglang.server import launch_environment
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.hf_in import model_source

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "arithmetic_grpo"))
from arithmetic import build_tokenizer  # a tokenizer of the model's vocabulary

# It imports `datasets` for one that is not used here, and SGLang's environment does without that package.
BENCH_SERVING = """
import runpy, sys, types
sys.modules["datasets"] = types.ModuleType("datasets")
sys.modules["datasets"].load_dataset = None
runpy.run_module("sglang.bench_serving", run_name="__main__", alter_sys=True)
"""
REQUESTS, PROMPT_TOKENS, MAX_TOKENS, CONCURRENCY = 96, 16, 64, 16


def measure_client(model: PreTrainedModel, python: str, rounds: int) -> dict[str, float | str]:
    """Tokens per second of both, and by how much of their time ours takes longer (``client_overhead``), medians."""
    architecture, source = model_source(model)
    layout = rollout_layout(architecture, 1, [[0]])
    server = {"python": python, "max_total_tokens": 8192, "args": {"disable-radix-cache": True}}
    engine = SGLangEngine(
        architecture,
        layout,
        dtype=torch.bfloat16,
        tokenizer=build_tokenizer(),
        max_running=CONCURRENCY,
        concurrency=CONCURRENCY,
        server=server,
    )
    with engine, tempfile.TemporaryDirectory() as folder:
        shards = empty_tensors(layout, 0, torch.bfloat16)
        fill(layout, 0, shards, source)
        engine.load_shards(shards, 1)
        build_tokenizer().save_pretrained(folder)
        model.config.save_pretrained(folder)
        speeds: dict[str, list[float]] = {"ours": [], "sglang": []}
        for index in range(rounds + 1):
            ours, theirs = our_round(engine, index), their_round(engine.urls[0], python, Path(folder), index)
            print(f"round {index}: ours {ours:.0f} tokens/s, sglang.bench_serving {theirs:.0f}", file=sys.stderr)
            if index:  # the first round warms up
                speeds["ours"].append(ours)
                speeds["sglang"].append(theirs)
    ratios = [theirs / ours for ours, theirs in zip(speeds["ours"], speeds["sglang"], strict=True)]
    return {
        "client_overhead": round(statistics.median(ratios) - 1.0, 4),
        "engine_tokens_per_s": round(statistics.median(speeds["ours"]), 1),
        "bench_serving_tokens_per_s": round(statistics.median(speeds["sglang"]), 1),
        "client_requests": f"{REQUESTS} x {MAX_TOKENS} tokens after {PROMPT_TOKENS}, {CONCURRENCY} at a time, TP1, CPU",
    }


def our_round(engine: SGLangEngine, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(4, 16, (REQUESTS, PROMPT_TOKENS), generator=generator).tolist()
    start = time.perf_counter()
    answers = engine.generate(prompts, SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True))
    seconds = time.perf_counter() - start
    tokens = sum(len(answer.token_ids) for group in answers for answer in group)
    assert tokens == REQUESTS * MAX_TOKENS
    return tokens / seconds


def their_round(url: str, python: str, folder: Path, seed: int) -> float:
    """`sglang.bench_serving` in a process of its own; it takes the time of the requests alone."""
    output = folder / f"round{seed}.jsonl"
    options = {
        "backend": "sglang",
        "base-url": url,
        "model": folder,
        "tokenizer": folder,
        "dataset-name": "random-ids",
        "random-input-len": PROMPT_TOKENS,
        "random-output-len": MAX_TOKENS,
        "random-range-ratio": 1.0,
        "num-prompts": REQUESTS,
        "max-concurrency": CONCURRENCY,
        "temperature": 1.0,
        "logprob-start-len": -1,
        "warmup-requests": 0,
        "seed": seed,
        "output-file": output,
    }
    command = [python, "-c", BENCH_SERVING, "--return-logprob", "--disable-stream", "--tokenize-prompt"]
    command += ["--disable-tqdm", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]
    environment = launch_environment(os.environ, "cpu", 1)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode or not output.exists():
        raise RuntimeError(
            f"sglang.bench_serving failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        )
    found = json.loads(output.read_text().splitlines()[-1])
    assert found["completed"] == REQUESTS
    return REQUESTS * MAX_TOKENS / found["duration"]
