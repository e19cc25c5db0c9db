"""Peaks of device memory where the project promises bounds; one JSON object on the last line, in MiB."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from megatron_rl.ops.copy_spans import copy_spans
from megatron_rl.ops.token_logprobs import token_logprobs

MIB = 2**20
TOKENS, HIDDEN, VOCAB = 16_384, 1024, 128_000


def peak(run: Callable[[], object]) -> float:
    """MiB held at once during ``run`` beyond what was held before."""
    run()  # compiles kernels, makes the library's workspaces
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)


def logprobs() -> dict[str, float]:
    """Forward and backward over a vocabulary whose fp32 logits would take 8 GB."""
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, VOCAB, (TOKENS,), device="cuda")

    def run() -> None:
        hidden.grad = weight.grad = None
        found, _ = token_logprobs(hidden, weight, targets)
        found.sum().backward()

    gradients = (hidden.numel() + weight.numel()) * 2 / MIB
    return {"peak": peak(run), "of that gradients": round(gradients, 1), "fp32 logits": TOKENS * VOCAB * 4 / MIB}


def copies() -> dict[str, float]:
    """A copy with a cast holds nothing but its tables."""
    source = torch.randn(64 * MIB, device="cuda")
    target = torch.empty(64 * MIB, device="cuda", dtype=torch.bfloat16)
    jobs = torch.tensor([[0, 0, 0, 0, 65_536, 1024, 1024, 1024]])
    return {
        name: peak(lambda name=name: copy_spans([source], [target], jobs, implementation=name))  # type: ignore[misc]
        for name in ("triton", "cuda")
    }


def main() -> None:
    found = {"token_logprobs_mib": logprobs(), "copy_spans_mib": copies()}
    logits = found["token_logprobs_mib"]
    assert logits["peak"] - logits["of that gradients"] < 0.35 * logits["fp32 logits"], logits
    assert max(found["copy_spans_mib"].values()) < 8, found
    print(json.dumps(found))


if __name__ == "__main__":
    main()
