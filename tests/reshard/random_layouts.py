"""Random layouts, and the oracle: slices of the full logical tensors, taken span by span."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from random import Random

import torch
from torch import Tensor

from megatron_rl.reshard import Layout, MemoryHub, Resharder, ReshardPlan, Shard, Span, TransferReport

Locals = dict[str, Tensor]


def random_shapes(rng: Random) -> dict[str, tuple[int, int]]:
    return {f"tensor{i}": (rng.randint(1, 12), rng.randint(1, 7)) for i in range(rng.randint(1, 4))}


def random_layout(
    rng: Random, name: str, shapes: Mapping[str, tuple[int, int]], ranks: list[int], complete: bool, overlaps: bool
) -> Layout:
    """Each tensor is cut by a grid; each block goes to some of the replicas.

    Args:
        complete: every element is held by at least one replica.
        overlaps: some replicas also hold rectangles that do not follow the grid.
    """
    num_cells = rng.randint(1, len(ranks))
    order = [*range(num_cells), *(rng.randrange(num_cells) for _ in range(len(ranks) - num_cells))]
    rng.shuffle(order)
    replica_of = {rank: f"replica{replica}" for rank, replica in zip(ranks, order, strict=True)}
    blocks: dict[str, list[tuple[str, tuple[int, int, int, int]]]] = {replica: [] for replica in replica_of.values()}
    for tensor, (rows, cols) in shapes.items():
        for block in _grid(rng, rows, cols):
            low = 1 if complete else 0
            holders = rng.sample(sorted(blocks), rng.randint(low, len(blocks)))
            for replica in holders:
                blocks[replica].append((tensor, block))
        if overlaps:
            top, left = rng.randrange(rows), rng.randrange(cols)
            extra = (top, rng.randint(top + 1, rows), left, rng.randint(left + 1, cols))
            blocks[rng.choice(sorted(blocks))].append((tensor, extra))
    shards = {replica: _shards(rng, name, held) for replica, held in blocks.items()}
    return Layout(name, replica_of, lambda replica: shards[replica])


def _grid(rng: Random, rows: int, cols: int) -> list[tuple[int, int, int, int]]:
    row_cuts = [0, *sorted(rng.sample(range(1, rows), rng.randint(0, min(3, rows - 1)))), rows]
    col_cuts = [0, *sorted(rng.sample(range(1, cols), rng.randint(0, min(2, cols - 1)))), cols]
    return [
        (top, bottom, left, right)
        for top, bottom in itertools.pairwise(row_cuts)
        for left, right in itertools.pairwise(col_cuts)
    ]


def _shards(rng: Random, name: str, held: list[tuple[str, tuple[int, int, int, int]]]) -> list[Shard]:
    """Random groups of blocks, stacked in random order with random padding between and beside them."""
    rng.shuffle(held)
    shards = []
    while held:
        take = [held.pop() for _ in range(rng.randint(1, min(3, len(held))))]
        width = max(right - left for _, (_, _, left, right) in take) + rng.randint(0, 2)
        row, spans = rng.randint(0, 1), []
        for tensor, (top, bottom, left, right) in take:
            col = rng.randint(0, width - (right - left))
            spans.append(Span(tensor, top, bottom, left, right, row, col))
            row += bottom - top + rng.randint(0, 1)
        shape = (row,) if width == 1 and rng.random() < 0.5 else (row, width)
        shards.append(Shard(f"{name}.{len(shards)}", shape, tuple(spans)))
    return shards


def logical_values(shapes: Mapping[str, tuple[int, int]], seed: int = 0) -> Locals:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def gather_and_slice(layout: Layout, rank: int, full: Mapping[str, Tensor], padding: float = 0.0) -> Locals:
    """What ``rank`` must hold, from the full tensors."""
    held = {}
    for shard in layout.shards(rank):
        local = torch.full(shard.matrix_shape, padding, dtype=next(iter(full.values())).dtype)
        for s in shard.spans:
            block = full[s.tensor].reshape(len(full[s.tensor]), -1)[s.row_start : s.row_stop, s.col_start : s.col_stop]
            local[s.row : s.row + s.num_rows, s.col : s.col + s.num_cols] = block
        held[shard.name] = local.reshape(shard.shape)
    return held


def run_ranks(ranks: tuple[int, ...], job: Callable[[int], object]) -> dict[int, object]:
    """Run ``job(rank)`` for all ranks as threads; re-raise the first error."""
    results: dict[int, object] = {}
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = job(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    assert len(results) == len(ranks), f"ranks {set(ranks) - set(results)} did not end"
    return results


def reshard_in_memory(
    plan: ReshardPlan,
    full: Mapping[str, Tensor],
    target_dtype: torch.dtype = torch.float32,
    padding: float = 7.0,
    runs: int = 1,
    **options,
) -> tuple[dict[int, Locals], dict[int, TransferReport]]:
    """Run all ranks of ``plan`` in one process. Target padding starts as ``padding``."""
    hub = MemoryHub(timeout=20)
    received: dict[int, Locals] = {}

    def job(rank: int) -> TransferReport:
        sources = gather_and_slice(plan.source, rank, full)
        received[rank] = {s.name: torch.full(s.shape, padding, dtype=target_dtype) for s in plan.target.shards(rank)}
        resharder = Resharder(plan.source, plan.target, rank, hub.transport(rank), plan=plan, **options)
        for _ in range(runs):
            report = resharder.run(sources, received[rank])
        return report

    reports = run_ranks(plan.ranks, job)
    return received, reports


def assert_bitwise_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype
    if not torch.equal(actual, expected):
        at = (actual != expected).nonzero()[0].tolist()
        raise AssertionError(f"{what}{at}: got {actual[tuple(at)]}, expected {expected[tuple(at)]}")


def rows_layout(name: str, ranks: Iterable[int], parts: int, rows: int = 8, cols: int = 4, tensor: str = "w") -> Layout:
    """Tensor ``w`` in ``parts`` equal blocks of rows; ranks beyond the first ``parts`` are replicas."""
    size = rows // parts

    def emit(replica: int) -> list[Shard]:
        return [Shard(f"{name}.w", (size, cols), (Span(tensor, replica * size, (replica + 1) * size, 0, cols, 0, 0),))]

    return Layout(name, {rank: i % parts for i, rank in enumerate(ranks)}, emit)
