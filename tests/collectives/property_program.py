"""Test program on 4 ranks: random messages against float64 sums, and whether wrong sums would be noticed.

Every rank draws the same cases. With an argument, that mutant is put in place on one rank first; rank 0 then prints
whether any check failed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from collectives_program import CPU, say, store

from megatron_rl.collectives.hierarchical import HierarchicalPath
from megatron_rl.collectives.nodes import NodeMap
from megatron_rl.collectives.policy import CollectivesConfig
from megatron_rl.collectives.process_group import register_backend
from megatron_rl.collectives.staging import Staging

CASES, MESSAGES = 12, 3
MUTATED_CASES = 4
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7}


@dataclass(frozen=True)
class Case:
    """One group of ranks and some messages over it."""

    nodes: NodeMap
    dtype: torch.dtype
    config: CollectivesConfig
    numels: tuple[int, ...]

    @classmethod
    def draw(cls, chance: random.Random) -> Case:
        size = chance.choice((2, 3, 4))
        hosts = [chance.randrange(chance.choice((1, 2, 3))) for _ in range(size)]
        links = chance.choice(((), ("lo",), ("lo", "lo")))
        config = CollectivesConfig.model_construct(  # unchecked: one interface stands for two
            chunk_mb=chance.choice((0.002, 0.01, 0.3)), links=links, wire_dtype="same", timeout_seconds=60.0
        )
        numels = tuple(chance.choice((1, 3, 1000, 4097, 70_001)) for _ in range(MESSAGES))
        return cls(NodeMap.of(list(map(str, hosts))), chance.choice(list(ROUNDING)), config, numels)


def contributions(case: Case, numel: int, message: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * message + numel)
    return [torch.randn(numel, generator=generator).to(case.dtype) for _ in range(case.nodes.size)]


def close(found: torch.Tensor, parts: Sequence[torch.Tensor]) -> bool:
    """Whether ``found`` is the sum but for what rounding to its dtype and of fp32 additions may change."""
    exact = sum(part.double() for part in parts)
    allowed = ROUNDING[found.dtype] * sum(part.double().abs() for part in parts)
    return bool(((found.double() - exact).abs() <= allowed).all())


def wrong_messages(case: Case, rank: int) -> int:
    """How many results of this rank are wrong, of three collectives for each message."""
    path = HierarchicalPath(dist.PrefixStore("path", store()), rank, case.nodes, case.config, CPU)
    wrong = 0
    for message, numel in enumerate(case.numels):
        parts = contributions(case, numel * case.nodes.size, message)
        summed, own = parts[rank].clone(), torch.empty(numel, dtype=case.dtype)
        path.all_reduce(summed)
        wrong += not close(summed, parts)
        path.reduce_scatter(own, parts[rank])
        wrong += not close(own, [part.view(case.nodes.size, -1)[rank] for part in parts])
        gathered = torch.empty_like(summed)
        mine = parts[rank][:numel] + message
        path.all_gather(gathered, mine)
        expected = torch.cat([part[:numel] + message for part in parts])
        wrong += not torch.equal(gathered, expected)
    path.close()
    return wrong


def check(rank: int, cases: int) -> int:
    """Wrong results of any rank, over all cases."""
    chance, wrong = random.Random(15), 0
    for _ in range(cases):
        case = Case.draw(chance)
        if rank < case.nodes.size:
            wrong += wrong_messages(case, rank)
        else:
            store()  # counts as the others do
    total = torch.tensor(wrong)
    dist.all_reduce(total)
    return int(total)


def unusual_tensors(rank: int) -> None:
    """Empty ones and transposed ones, through the process group."""
    config = CollectivesConfig(all_reduce="hybrid", deterministic=True, timeout_seconds=60)
    group = dist.new_group(list(range(4)), backend=register_backend(config))
    empty = torch.empty(0)
    dist.all_reduce(empty, group=group)
    matrix = torch.arange(12.0).view(3, 4).t() * (rank + 1)
    assert not matrix.is_contiguous()
    dist.all_reduce(matrix, group=group)
    assert torch.equal(matrix, torch.arange(12.0).view(3, 4).t() * 10)
    scalar = torch.tensor(float(rank))
    dist.all_reduce(scalar, group=group)
    assert scalar == 6
    say(rank, "empty, transposed and scalar tensors")


def drop_a_part(original: Callable[..., None]) -> Callable[..., None]:
    return lambda self, parts, out: original(self, parts[:-1] if len(parts) > 1 else parts, out)


def add_a_part_twice(original: Callable[..., None]) -> Callable[..., None]:
    return lambda self, parts, out: original(self, [*parts, parts[0]] if len(parts) > 1 else parts, out)


def keep_the_last_message(original: Callable[..., None]) -> Callable[..., None]:
    """What was in node memory stays there: every eighth copy into it or from it is late."""
    count = iter(range(10**9))
    return lambda self, to, source: None if next(count) % 8 == 7 else original(self, to, source)


MUTANTS = {
    "dropped": ("sum", drop_a_part),
    "twice": ("sum", add_a_part_twice),
    "late": ("copy", keep_the_last_message),
}


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if len(sys.argv) > 1:
        name, change = MUTANTS[sys.argv[1]]
        if rank == 1:
            setattr(Staging, name, change(getattr(Staging, name)))
        say(rank, f"{check(rank, MUTATED_CASES)} wrong results")
    else:
        wrong = check(rank, CASES)
        assert wrong == 0, f"{wrong} wrong results"
        say(rank, f"{CASES} random cases")
        unusual_tensors(rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
