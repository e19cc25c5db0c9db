"""Memory and time of `ops.token_logprobs` against log_softmax and gather: one JSON object on the last line.

`python tools/bench_logprob.py [--tokens 4096] [--hidden 1024] [--rounds 3] [--threads 1] [--implementation cpu]`.
Forward and backward with a random gradient for every token, at vocabularies of 32,000 and 152,064 rows; ratios are ours
over theirs. ``v32k`` and ``v152k`` have bf16 hidden states and weights, as in training, and take the softmax in fp32;
``float32`` holds the same two with everything in fp32. Time is CPU time (user and system), both sides taking turns in
one process, median over rounds. Memory is what the resident set grows by over the inputs, gradients included, each side
in a process of its own that has run both once on small inputs. ``half_masked`` repeats ours and theirs with every other
token's gradient 0, as with prompts in a batch: ours does no backward work for those.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_rl.devices import current_platform  # noqa: E402
from megatron_rl.ops.token_logprobs import token_logprobs  # noqa: E402

VOCABULARIES = {"v32k": 32_000, "v152k": 152_064}
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grad: Tensor

    @classmethod
    def random(cls, tokens: int, hidden: int, vocab: int, dtype: torch.dtype, masked: bool = False) -> Inputs:
        torch.manual_seed(0)
        grad = torch.randn(tokens)
        if masked:
            grad[::2] = 0
        return cls(
            torch.randn(tokens, hidden, dtype=dtype).requires_grad_(),
            torch.empty(vocab, hidden, dtype=dtype).normal_(std=0.02).requires_grad_(),
            torch.randint(0, vocab, (tokens,)),
            grad,
        )

    def forget_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


def theirs(inputs: Inputs, implementation: str | None) -> None:
    logs = torch.log_softmax((inputs.hidden @ inputs.weight.t()).float(), dim=-1)
    logprobs = logs.gather(1, inputs.targets[:, None]).squeeze(1)
    del logs
    logprobs.backward(inputs.grad)


def ours(inputs: Inputs, implementation: str | None) -> None:
    logprobs, _ = token_logprobs(inputs.hidden, inputs.weight, inputs.targets, implementation=implementation)
    logprobs.backward(inputs.grad)


SIDES: dict[str, Callable[[Inputs, str | None], None]] = {"theirs": theirs, "ours": ours}


def times(inputs: Inputs, implementation: str | None, rounds: int) -> dict[str, float]:
    """Median CPU seconds of each side."""
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, run in SIDES.items():
            start = time.process_time()
            run(inputs, implementation)
            seconds[side].append(time.process_time() - start)
            inputs.forget_gradients()
    return {side: statistics.median(values) for side, values in seconds.items()}


def growth(inputs: Inputs, side: str, implementation: str | None) -> int:
    """Bytes by which the resident set grows over the inputs."""
    platform = current_platform()
    platform.reset_peak_memory()
    before = platform.peak_memory_bytes()
    SIDES[side](inputs, implementation)
    return platform.peak_memory_bytes() - before


def measure(args: argparse.Namespace) -> None:
    """One measurement in this process: time of both sides, or memory of one. Prints JSON."""
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    small = Inputs.random(600, args.hidden, 2048, dtype)
    for run in SIDES.values():  # loads code, which is no part of either side's work
        run(small, args.implementation)
    del small
    inputs = Inputs.random(args.tokens, args.hidden, args.vocab, dtype, masked=args.measure == "masked")
    if args.measure in SIDES:
        print(json.dumps(growth(inputs, args.measure, args.implementation)))
    else:
        print(json.dumps(times(inputs, args.implementation, args.rounds)))


def in_a_process(args: argparse.Namespace, what: str, vocab: int, dtype: str) -> float | dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, "--vocab", str(vocab), "--dtype", dtype]
    for name in ("tokens", "hidden", "rounds", "threads", "implementation"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=3600)
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace, vocab: int, dtype: str) -> dict[str, object]:
    memory = {side: in_a_process(args, side, vocab, dtype) for side in SIDES}
    seconds, masked = (in_a_process(args, what, vocab, dtype) for what in ("time", "masked"))
    return {
        "memory_ratio": round(memory["ours"] / memory["theirs"], 4),
        "time_ratio": round(seconds["ours"] / seconds["theirs"], 3),
        "time_ratio_half_masked": round(masked["ours"] / masked["theirs"], 3),
        "ours_mb": round(memory["ours"] / 2**20, 1),
        "theirs_mb": round(memory["theirs"] / 2**20, 1),
        "ours_s": round(seconds["ours"], 2),
        "theirs_s": round(seconds["theirs"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--implementation", default=None)
    parser.add_argument("--measure", choices=[*SIDES, "time", "masked"], help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args)
        return
    found: dict[str, dict[str, object]] = {dtype: {} for dtype in DTYPES}
    for dtype in DTYPES:
        for name, vocab in VOCABULARIES.items():
            found[dtype][name] = compare(args, vocab, dtype)
            print(f"{name} {dtype}: {found[dtype][name]}", flush=True)
    print(json.dumps(found["bfloat16"] | {"float32": found["float32"]}))


if __name__ == "__main__":
    main()
