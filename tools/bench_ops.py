"""GB/s of every implementation of every operation that runs here, beside memcpy's: one JSON object on the last line.

`python tools/bench_ops.py [--scale 1.0] [--rounds 9] [--threads 1]`. The work is one weight push of a model of
Qwen2.5-0.5B's shape (490 million parameters at scale 1): Megatron TP2 shards in float32, QKV interleaved by group, to
SGLang's fused bfloat16 parameters. Bytes are those an operation must read and write, without what caches add;
implementations take turns within each round, and the figure is the median over rounds; what takes less than 5 ms is
repeated, after a call that is not counted, so that nobody pays for the cache that his predecessor left. ``choose_us``
is what finding the implementation adds to each call, in microseconds. With one thread, time is the
thread's own (user and system): on a quiet machine that is the wall time, and on a shared one it leaves out the
neighbours' turns, though not their use of the memory bus.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_rl.ops.add_rms_norm import add_rms_norm
from megatron_rl.ops.block_quantize import block_quantize
from megatron_rl.ops.copy_spans import copy_spans
from megatron_rl.ops.decode_attention import decode_attention
from megatron_rl.ops.gae import gae
from megatron_rl.ops.selection import UnavailableError, choose, implementations, load
from megatron_rl.ops.span_checksum import span_checksum, tensor_key
from megatron_rl.ops.token_logprobs import token_logprobs

ROOT = Path(__file__).resolve().parents[1]
SHORTEST = 0.005  # seconds of calls that one figure is taken from
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, TP = 896, 4864, 14, 2, 64, 151_936, 2


class Push:
    """Sources, destinations and the job table of one push; the shapes are of one rollout rank (TP1)."""

    def __init__(self, layers: int, vocab: int) -> None:
        self.sources: list[Tensor] = []
        self.destinations: list[Tensor] = []
        self.jobs: list[list[int]] = []
        self._rows(vocab, HIDDEN)
        for _ in range(layers):
            self._qkv()
            self._columns(HIDDEN, HEADS * HEAD_DIM)
            self._gate_up()
            self._columns(HIDDEN, FFN)
        self.table = torch.tensor(self.jobs)
        self.cols = [HIDDEN] + [HIDDEN, HEADS * HEAD_DIM, HIDDEN, FFN] * layers
        self.numel = sum(tensor.numel() for tensor in self.destinations)

    def shapes(self) -> Iterator[tuple[int, tuple[int, int]]]:
        """(index, (rows, cols)) of every destination."""
        for index, (tensor, cols) in enumerate(zip(self.destinations, self.cols, strict=True)):
            yield index, (tensor.numel() // cols, cols)

    def _add(self, rows: int, cols: int, parts: list[tuple[int, int]]) -> tuple[int, int]:
        """New destination [rows, cols] and new sources of the given shapes; returns the first indices of both."""
        first = len(self.sources)
        self.sources += [torch.rand(1009, 16).flatten().repeat(r * c // 16144 + 1)[: r * c] for r, c in parts]
        self.destinations.append(torch.zeros(rows * cols, dtype=torch.bfloat16))
        return first, len(self.destinations) - 1

    def _rows(self, rows: int, cols: int) -> None:
        half = rows // TP
        src, dst = self._add(rows, cols, [(half, cols)] * TP)
        self.jobs += [[src + t, dst, 0, t * half * cols, half, cols, cols, cols] for t in range(TP)]

    def _columns(self, rows: int, cols: int) -> None:
        half = cols // TP
        src, dst = self._add(rows, cols, [(rows, half)] * TP)
        self.jobs += [[src + t, dst, 0, t * half, rows, half, half, cols] for t in range(TP)]

    def _gate_up(self) -> None:
        half = FFN // TP
        src, dst = self._add(2 * FFN, HIDDEN, [(2 * half, HIDDEN)] * TP)
        for t in range(TP):
            for part in range(2):
                row = part * FFN + t * half
                self.jobs.append([src + t, dst, part * half * HIDDEN, row * HIDDEN, half, HIDDEN, HIDDEN, HIDDEN])

    def _qkv(self) -> None:
        group = HEADS // KV_HEADS
        src, dst = self._add((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN, [((group + 2) * HEAD_DIM, HIDDEN)] * KV_HEADS)
        for g in range(KV_HEADS):
            heads = [(head, g * group + head) for head in range(group)]
            heads += [(group, HEADS + g), (group + 1, HEADS + KV_HEADS + g)]
            for head, target in heads:
                job = [src + g, dst, head * HEAD_DIM * HIDDEN, target * HEAD_DIM * HIDDEN]
                self.jobs.append([*job, HEAD_DIM, HIDDEN, HIDDEN, HIDDEN])


def careful_torch(push: Push) -> None:
    """What a careful author writes without `copy_spans`: views of both sides, made by narrow, and `copy_`."""
    for src, dst, src_offset, dst_offset, rows, cols, src_stride, dst_stride in push.jobs:
        source = push.sources[src].view(-1, src_stride).narrow(0, src_offset // src_stride, rows)
        row, col = divmod(dst_offset, dst_stride)
        push.destinations[dst].view(-1, dst_stride).narrow(0, row, rows).narrow(1, col, cols).copy_(source)


def naive_torch(push: Push) -> None:
    """What loaders commonly do: gather the full tensor with cat, then cast it."""
    by_destination: dict[int, list[list[int]]] = {}
    for job in push.jobs:
        by_destination.setdefault(job[1], []).append(job)
    for dst, jobs in by_destination.items():
        column_parallel = jobs[0][6] != jobs[0][7]
        parts = [push.sources[job[0]].view(-1, job[6])[job[2] // job[6] :][: job[4]] for job in jobs]
        if not column_parallel:
            parts = [part for _, part in sorted(zip(jobs, parts, strict=True), key=lambda pair: pair[0][3])]
        push.destinations[dst].copy_(torch.cat(parts, int(column_parallel)).to(torch.bfloat16).view(-1))


def memcpy(num_bytes: int) -> Callable[[], object]:
    """libc's memcpy of one block, reading and writing ``num_bytes`` in total."""
    source, target = (torch.ones(num_bytes // 2, dtype=torch.uint8) for _ in range(2))
    function = ctypes.CDLL(None).memcpy
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return lambda: function(target.data_ptr(), source.data_ptr(), num_bytes // 2)


def runnable(op: str) -> list[str]:
    """Implementations of ``op`` that run on this CPU; what cannot is said on stderr."""
    names = []
    for name in implementations(op):
        try:
            load(op, name, "cpu")
            names.append(name)
        except UnavailableError as reason:
            print(f"{op} {name}: not measured, {reason}", file=sys.stderr)
    return names


def whole(index: int, shape: tuple[int, int]) -> list[int]:
    """The span of `span_checksum` that covers all of one tensor."""
    rows, cols = shape
    return [index, 0, tensor_key(str(index), torch.bfloat16), 0, 0, 0, rows, cols, cols]


Calls = dict[str, tuple[int, Callable[[str], object]]]  # operation -> (bytes, call by implementation name)


@dataclass(frozen=True)
class Case:
    """One implementation of one operation: what it must read and write, in bytes, and the call."""

    op: str
    implementation: str
    num_bytes: int
    run: Callable[[], object]


def weight_calls(push: Push) -> Calls:
    """The operations of a weight push."""
    tensors, table = push.destinations, push.table
    matrix = torch.randn(4 * HIDDEN, FFN).bfloat16()
    spans = torch.tensor([whole(index, shape) for index, shape in push.shapes() if index % 4])  # the reference is slow
    return {
        "copy_spans": (
            push.numel * 6,
            lambda name: copy_spans(push.sources, tensors, table, checked=False, implementation=name),
        ),
        "span_checksum": (
            int((spans[:, 6] * spans[:, 7]).sum()) * 2,
            lambda name: span_checksum(tensors, spans, checked=False, implementation=name),
        ),
        "block_quantize": (matrix.numel() * 3, lambda name: block_quantize(matrix, implementation=name)),
    }


def model_calls() -> Calls:
    """The operations of rollout and training. Their bytes are inputs and outputs: most of them are bound by compute."""
    tokens = torch.randn(1 << 16)
    mask, starts = torch.rand(len(tokens)) < 0.8, torch.arange(0, len(tokens) + 1, 1024)
    hidden, weight, targets = torch.randn(256, 256), torch.randn(16_384, 256), torch.arange(256)
    delta, norm = torch.randn(256, 256), torch.ones(256)
    qkv, angles = torch.randn(16, HEADS + 2 * KV_HEADS, HEAD_DIM), torch.randn(2, 16, 1, HEAD_DIM)
    cache, positions = torch.randn(16, KV_HEADS, 2, 512, HEAD_DIM), torch.full((16,), 511)
    return {
        "gae": (
            len(tokens) * (4 * 4 + 1),
            lambda name: gae(tokens, tokens, mask, starts, 0.99, 0.95, implementation=name),
        ),
        "token_logprobs": (
            (hidden.numel() + weight.numel()) * 4,
            lambda name: token_logprobs(hidden, weight, targets, implementation=name),
        ),
        "add_rms_norm": (
            hidden.numel() * 4 * 4,
            lambda name: add_rms_norm(hidden, delta, norm, 1e-6, implementation=name),
        ),
        "decode_attention": (
            cache.numel() * 4,
            lambda name: decode_attention(qkv, angles[0], angles[1], cache, positions, 512, implementation=name),
        ),
    }


def cases(push: Push) -> list[Case]:
    """Everything to time; the same inputs for all implementations of an operation."""
    found = [
        Case(op, name, num_bytes, functools.partial(call, name))
        for op, (num_bytes, call) in (weight_calls(push) | model_calls()).items()
        for name in runnable(op)
    ]
    found.append(Case("copy_spans", "torch_slices", push.numel * 6, lambda: careful_torch(push)))
    found.append(Case("copy_spans", "torch_cat", push.numel * 6, lambda: naive_torch(push)))
    return found


def check_copies(push: Push, copies: list[Case]) -> None:
    """All ways of copying must leave the same bits: compared by checksum, from destinations filled with ones."""
    spans = torch.tensor([whole(index, shape) for index, shape in push.shapes()])
    sums = {}
    for case in copies:
        for tensor in push.destinations:
            tensor.fill_(1)
        case.run()
        sums[case.implementation] = int(span_checksum(push.destinations, spans, checked=False))
    if len(set(sums.values())) != 1:
        raise RuntimeError(f"the copies differ: checksums {sums}")


def start_seconds() -> tuple[float, float]:
    """Seconds to load the compiled CPU operations in a new process, at first (it builds them) and the second time."""
    program = (
        "import time, torch; from megatron_rl.ops.selection import load; start = time.perf_counter(); "
        "load('copy_spans', 'cpu', 'cpu'); print(time.perf_counter() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "MEGATRON_RL_CACHE": cache, "PYTHONPATH": str(ROOT)}
        runs = [
            subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
            for _ in range(2)
        ]
    first, second = (float(run.stdout) for run in runs)
    return first, second


def seconds(run: Callable[[], object], clock: Callable[[], float], calls: int = 1) -> float:
    """Of one call among ``calls``; several begin after one that is not counted."""
    if calls > 1:
        run()
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls


def measured(everything: list[Case], rounds: int, clock: Callable[[], float]) -> dict[Case, float]:
    """Case -> GB/s, by the median; what takes over a second joins every third round only."""
    calls = {case: max(1, round(SHORTEST / max(seconds(case.run, clock, 2), 1e-6))) for case in everything}
    times: dict[Case, list[float]] = {case: [] for case in everything}
    for number in range(rounds):
        for case, found in times.items():
            if number % 3 == 0 or found[0] < 1.0:
                found.append(seconds(case.run, clock, calls[case]))
    return {case: round(case.num_bytes / statistics.median(found) / 1e9, 3) for case, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the 490 million parameters")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    push = Push(max(1, round(24 * options.scale)), max(64, round(VOCAB * options.scale) // 64 * 64))
    everything = cases(push)
    check_copies(push, [case for case in everything if case.op == "copy_spans"])
    bound = Case("memcpy", "libc", push.numel * 6, memcpy(push.numel * 6))

    clock = time.thread_time if options.threads == 1 else time.perf_counter
    rates = measured([bound, *everything], options.rounds, clock)
    result: dict[str, object] = {"memcpy_gbps": rates.pop(bound)}
    for op in dict.fromkeys(case.op for case in rates):
        result[op] = {case.implementation: rate for case, rate in rates.items() if case.op == op}
    result["choose_us"] = round(seconds(lambda: choose("add_rms_norm", "cpu"), clock, 10_000) * 1e6, 2)
    first, second = start_seconds()
    result |= {"first_start_s": round(first, 2), "second_start_s": round(second, 4)}
    result |= {"num_parameters": push.numel, "threads": options.threads, "clock": clock.__name__}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
