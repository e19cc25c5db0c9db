"""Run on 4 ranks by test_context: every group of every layout holds the ranks the layout says; a line for each."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import megatron_rl  # noqa: F401  (before megatron.core)
from megatron_rl.config import ConfigError
from megatron_rl.parallel import ParallelContext, ParallelSizes

from megatron.core import parallel_state  # isort: skip

# Ranks of the group of each rank, written by hand: layout -> axis -> sets.
PAIRS, STRIDED, EACH, ALL = [[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]], [[0, 1, 2, 3]]
LAYOUTS = {
    "TP2PP2": (
        ParallelSizes(tp=2, pp=2),
        {"tp": PAIRS, "pp": STRIDED, "cp": EACH, "dp": EACH, "dp_cp": EACH, "model": ALL, "edp": PAIRS},
    ),
    "DP4": (ParallelSizes(), {"tp": EACH, "pp": EACH, "dp": ALL, "dp_cp": ALL, "model": EACH, "edp": ALL}),
    "TP4": (ParallelSizes(tp=4, etp=4), {"tp": ALL, "etp": ALL, "dp": EACH, "model": ALL, "edp": EACH}),
    "PP4": (ParallelSizes(pp=4), {"pp": ALL, "tp": EACH, "dp": EACH, "model": ALL}),
    "TP2DP2": (ParallelSizes(tp=2, sequence_parallel=True), {"tp": PAIRS, "dp": STRIDED, "model": PAIRS}),
    "PP2DP2": (ParallelSizes(pp=2), {"dp": PAIRS, "pp": STRIDED, "model": STRIDED}),
    "CP2DP2": (ParallelSizes(cp=2), {"cp": PAIRS, "dp": STRIDED, "dp_cp": ALL, "model": PAIRS}),
    "TP2CP2": (ParallelSizes(tp=2, cp=2), {"tp": PAIRS, "cp": STRIDED, "dp": EACH, "dp_cp": STRIDED, "model": ALL}),
    "CP2PP2": (ParallelSizes(cp=2, pp=2), {"cp": PAIRS, "pp": STRIDED, "dp_cp": PAIRS, "model": ALL}),
    "PP2VPP2": (ParallelSizes(pp=2, vpp=2), {"pp": STRIDED, "dp": PAIRS, "model": STRIDED}),
    "EP2": (ParallelSizes(ep=2), {"ep": PAIRS, "edp": STRIDED, "dp": ALL, "etp": EACH, "model": EACH}),
    "EP4": (ParallelSizes(ep=4), {"ep": ALL, "edp": EACH, "dp": ALL}),
    "TP2EP2": (ParallelSizes(tp=2, ep=2), {"tp": PAIRS, "ep": PAIRS, "edp": STRIDED, "dp": STRIDED}),
    "ETP2EP2": (ParallelSizes(tp=2, ep=2, etp=2), {"etp": PAIRS, "ep": STRIDED, "edp": EACH, "dp": STRIDED}),
    "EP2PP2": (ParallelSizes(ep=2, pp=2), {"ep": PAIRS, "pp": STRIDED, "edp": EACH, "dp": PAIRS}),
}
MEGATRON_NAMES = {"etp": "expt_tp", "edp": "expt_dp"}  # of groups, where they differ from the names of our axes
TIMEOUT = 120.0


def num_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def check_groups(context: ParallelContext, expected: dict[str, list[list[int]]]) -> None:
    rank = dist.get_rank()
    for axis, sets in expected.items():
        mine = next(ranks for ranks in sets if rank in ranks)
        group = context.model_group if axis == "model" else getattr(context.collection, MEGATRON_NAMES.get(axis, axis))
        assert dist.get_process_group_ranks(group) == mine, (axis, mine)
        summed = torch.tensor([10.0**rank])
        dist.all_reduce(summed, group=group)
        assert summed.item() == sum(10.0**peer for peer in mine), (axis, summed)
    replica = next(ranks for ranks in expected.get("model", [[rank]]) if rank in ranks)
    if "model" in expected:
        assert context.gather_objects((rank, "x"), "model") == [(peer, "x") for peer in replica]
    assert context.gather_objects(rank) == [0, 1, 2, 3]
    assert context.objects_on_rank_0((rank, "x" * rank)) == ([(r, "x" * r) for r in range(4)] if rank == 0 else [])


def check_stages(context: ParallelContext) -> None:
    last = dist.get_process_group_ranks(context.pp_group)[-1]
    assert context.is_last_stage == (dist.get_rank() == last)


def check_layout(name: str) -> None:
    sizes, expected = LAYOUTS[name]
    context = ParallelContext.create(sizes, TIMEOUT, seed=5)
    assert context.sizes == sizes
    check_groups(context, expected)
    check_stages(context)
    made = num_groups()
    again = ParallelContext.from_parallel_state(parallel_state, sizes.sequence_parallel, TIMEOUT)
    same = ParallelContext.from_process_groups(context.collection, sizes.vpp, timeout=TIMEOUT)
    third = ParallelContext.create(sizes, TIMEOUT)
    assert num_groups() == made, "groups were made twice"
    assert again.sizes == third.sizes == sizes
    assert again.model_group is same.model_group is context.model_group
    assert again.host_group is context.host_group is dist.group.WORLD
    check_seeds(context)
    with pytest.raises(ConfigError, match="already initialised with ParallelSizes"):
        ParallelContext.create(ParallelSizes(pp=2, cp=2, etp=2), TIMEOUT)


def check_seeds(context: ParallelContext) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    plain = torch.rand(()).item()
    with get_cuda_rng_tracker().fork():
        parallel = torch.rand(()).item()
    draws = context.gather_objects((plain, parallel, context.coordinates.pp, context.coordinates.tp))
    assert len({draw[0] for draw in draws}) == context.sizes.pp
    assert len({draw[1] for draw in draws}) == context.sizes.pp * context.sizes.tp


def check_other_order() -> None:
    parallel_state.initialize_model_parallel(1, 2, order="tp-cp-ep-pp-dp")
    with pytest.raises(ConfigError, match=r"the pp group holds ranks .* order='tp-cp-ep-dp-pp'"):
        ParallelContext.from_parallel_state(parallel_state, timeout=TIMEOUT)


def check_refusals() -> None:
    with pytest.raises(ConfigError, match=r"tp=3 \* pp=1 \* cp=1 = 3 ranks .* torchrun started 4"):
        ParallelContext.create(ParallelSizes(tp=3), TIMEOUT)
    with pytest.raises(ConfigError, match=r"parallel\.vpp=2 with pp=1"):
        ParallelContext.create(ParallelSizes(vpp=2), TIMEOUT)
    with pytest.raises(ConfigError, match=r"call parallel_state\.initialize_model_parallel"):
        ParallelContext.from_parallel_state(parallel_state)


def main() -> None:
    check_refusals()
    held("refusals")
    for name in LAYOUTS:
        try:
            check_layout(name)
        except Exception as error:
            raise AssertionError(f"layout {name}") from error
        parallel_state.destroy_model_parallel()
        held(name)
    check_other_order()
    held("another order of axes")
    dist.destroy_process_group()


def held(case: str) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"held: {case}", flush=True)


if __name__ == "__main__":
    main()
