"""One entry of `families.FAMILIES` in every layout of one number of ranks, against what `transformers` computes.

In each layout: logits through Megatron's pipeline schedule, a Hugging Face folder with the bits, names and dtypes that
were read, and the weights after one step of gradient descent. On four ranks also log-probabilities of what the local
engine samples on 1, 2 and 4 of them, and a Megatron checkpoint on the way there and back.

usage: matrix_program.py FOLDER    (as `reference.py` wrote it; prints a JSON line for each case)
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engines.megatron.model.parity_program import assert_same_files, pipeline_logits, read_files, there_and_back
from matrix.reference import Expected
from safetensors.torch import load_file

import megatron_rl  # noqa: F401  (installs the CPU face before megatron.core is imported)
from megatron_rl.batch import Batch
from megatron_rl.engines.base import TrainingEngine
from megatron_rl.engines.build import build_engine
from megatron_rl.engines.engine_config import EngineConfig, OptimizerConfig
from megatron_rl.engines.micro_batches import plan_micro_batches
from megatron_rl.models import Architecture, rollout_layout
from megatron_rl.parallel import ParallelContext, ParallelSizes
from megatron_rl.rollout import LocalEngine, SamplingParams
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.hf_in import read_architecture
from megatron_rl.weights.hf_out import save_hf
from megatron_rl.weights.source import SafetensorsFolder
from megatron_rl.workers.outputs import logprob_output

# By the number of ranks: no replicas but in tp2, which has two.
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}},
    2: {"pp2": {"pp": 2}, "pp2vpp2": {"pp": 2, "vpp": 2}},
    4: {
        "tp2": {"tp": 2},
        "tp4": {"tp": 4},  # more ranks than key and value heads, in some
        "tp2pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    },
}
OF_EXPERTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {},
    2: {"ep2": {"ep": 2}},
    4: {"tp2ep2pp2": {"tp": 2, "ep": 2, "pp": 2, "sequence_parallel": True}},
}
STILL = (".experts.", "correction_bias")  # no token may choose an expert; a bias of the choice has no gradient
SGD = OptimizerConfig(optimizer="sgd", learning_rate=0.01, clip_gradient=0.0)


def layouts_of(architecture: Architecture, ranks: int) -> dict[str, ParallelSizes]:
    mixes = architecture.experts is not None
    found = LAYOUTS[ranks] | (OF_EXPERTS[ranks] if mixes else {})
    together = {"sequence_parallel": True} if mixes else {}  # which tensor-parallel experts need
    return {name: ParallelSizes(**sizes | (together if "tp" in sizes else {})) for name, sizes in found.items()}


@dataclass
class Case:
    """One family in one layout."""

    folder: Path
    expected: Expected
    context: ParallelContext
    engine: TrainingEngine

    def logits_error(self) -> float:
        """Largest difference, relative to the largest logit; the same on every rank."""
        chunks = [chunk.eval() for chunk in self.engine.chunks]
        logits = pipeline_logits(chunks, self.context, self.expected.ids, self.engine.architecture.vocab)
        wanted, error = self.expected.logits, torch.zeros(())
        if logits is not None:
            error = (logits - wanted).abs().max() / wanted.abs().max()
            assert not error.isnan()
        dist.all_reduce(error, op=dist.ReduceOp.MAX)
        return float(error)

    def save(self, name: str) -> Path:
        folder = self.folder / name
        layout, tensors = self.engine.layout, self.engine.published()
        save_hf(layout, tensors, self.engine.architecture, folder, rank=self.context.rank, max_shard_bytes=200_000)
        dist.barrier()
        return folder

    def check_files(self) -> None:
        saved = self.save("saved")
        if self.context.rank == 0:
            assert_same_files(self.folder, saved)
            shutil.rmtree(saved)
        dist.barrier()

    def step_error(self) -> float:
        """Largest difference of a weight after one step, between here and `transformers`; on rank 0."""
        replicas, mine = self.context.dp_size, self.context.coordinates.dp
        rows = self.expected.rows()[mine::replicas]
        batch = Batch.from_sequences(rows, [[0] + [1] * (len(row) - 1) for row in rows])
        predicted = logprob_output(self.engine, batch, temperature=1.0)

        def output(micro_batch, hidden):
            loss = -predicted(micro_batch, hidden).sum() / self.expected.num_predicted
            return loss, float(loss)

        self.engine.forward_backward(batch, plan_micro_batches(batch, self.engine), output)
        self.engine.step()
        self.engine.sync_parameters()
        saved, error = self.save("stepped"), 0.0
        if self.context.rank == 0:
            found, before = read_files(saved), read_files(self.folder)
            for name, weight in self.expected.stepped.items():
                moved = (weight - before[name]).abs().max()
                still = any(part in name for part in STILL)
                assert moved > 0 or still, f"{name} does not move"
                error = max(error, float((found[name] - weight).abs().max()))
            shutil.rmtree(saved)
        dist.barrier()
        return error


def run_layout(folder: Path, expected: Expected, layout: str, sizes: ParallelSizes) -> None:
    ParallelContext.forget()
    context = ParallelContext.create(sizes, timeout=120, seed=1)
    config = EngineConfig(optimizer=SGD, token_budget=64)
    case = Case(folder, expected, context, build_engine(str(folder), context, config, name="model"))
    case.check_files()
    logits, step = case.logits_error(), case.step_error()
    report(layout, logits=logits, step=step)


def run_rollouts(folder: Path, expected: Expected) -> None:
    """What the local engine says of its own samples, beside a forward pass of transformers."""
    groups = {1: None, 2: dist.new_group([0, 1]), 4: dist.group.WORLD}
    for tp, group in groups.items():
        error = rollout_error(folder, expected, tp, group) if dist.get_rank() < tp else 0.0
        report(f"local engine, tp{tp}", local=error)


def rollout_error(folder: Path, expected: Expected, tp: int, group: dist.ProcessGroup | None) -> float:
    architecture = read_architecture(folder)
    layout = rollout_layout(architecture, tp, [list(range(tp))])
    shards = empty_tensors(layout, dist.get_rank(), torch.float32)
    with SafetensorsFolder(folder) as source:
        fill(layout, dist.get_rank(), shards, source)
    engine = LocalEngine(architecture, layout, dist.get_rank(), tp_group=group)
    engine.load_shards(shards, 1)
    prompts = [row[:length] for row, length in zip(expected.rows(), (13, 3, 8), strict=False)]
    completions = engine.generate(prompts, SamplingParams(n=2, max_tokens=16, ignore_eos=True))
    return expected.logprob_error(prompts, completions) if dist.get_rank() == 0 else 0.0


def report(layout: str, **errors: float) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps([layout, errors]), flush=True)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ParallelContext.create(ParallelSizes(), timeout=120, seed=1)
    expected = Expected(folder, **load_file(folder.with_suffix(".expected")))
    for layout, sizes in layouts_of(read_architecture(folder), dist.get_world_size()).items():
        run_layout(folder, expected, layout, sizes)
    ParallelContext.forget()
    if dist.get_world_size() == 4:
        run_rollouts(folder, expected)
        there_and_back(folder, ParallelSizes(tp=2, pp=2, sequence_parallel=True))
        report("checkpoint")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
