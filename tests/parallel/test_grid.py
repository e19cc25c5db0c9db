"""`RankGrid` against Megatron-Core's own rank generator, and the errors of impossible sizes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config import ConfigError
from megatron_rl.parallel import ParallelSizes, RankGrid

sizes = st.sampled_from([1, 2, 3, 4])


@given(tp=sizes, cp=sizes, dp=sizes, pp=sizes)
def test_dense_coordinates_are_those_of_megatrons_default_order(tp: int, cp: int, dp: int, pp: int) -> None:
    import megatron_rl  # noqa: F401  (before megatron.core)

    from megatron.core.parallel_state import RankGenerator  # isort: skip

    grid = RankGrid(ParallelSizes(tp=tp, cp=cp, pp=pp), tp * cp * dp * pp)
    theirs = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order="tp-cp-ep-dp-pp")
    for axis, others in {"tp": ("cp", "dp", "pp"), "pp": ("tp", "cp", "dp"), "dp-cp": ("tp", "pp")}.items():
        assert sorted(grid.partition(*others)) == sorted(map(tuple, theirs.get_ranks(axis)))
    for ranks in theirs.get_ranks("dp"):
        assert [grid.coordinates(rank).dp for rank in ranks] == list(range(dp))


@given(etp=sizes, ep=sizes, edp=sizes, pp=sizes)
def test_expert_coordinates_are_those_of_megatrons_expert_grid(etp: int, ep: int, edp: int, pp: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    grid = RankGrid(ParallelSizes(etp=etp, ep=ep, pp=pp), etp * ep * edp * pp)
    theirs = RankGenerator(tp=etp, ep=ep, dp=edp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    for axis, others in {"tp": ("ep", "edp", "pp"), "ep": ("etp", "edp", "pp"), "dp": ("etp", "ep", "pp")}.items():
        assert sorted(grid.partition(*others)) == sorted(map(tuple, theirs.get_ranks(axis)))


def test_ranks_of_a_coordinate_are_ascending() -> None:
    grid = RankGrid(ParallelSizes(tp=2, pp=2), 8)
    assert grid.ranks(dp=0, pp=1) == (4, 5)
    assert grid.ranks(tp=1) == (1, 3, 5, 7)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp": 3, "pp": 2}, r"tp=3 \* pp=2 \* cp=1 = 6 ranks for one replica of the model, but torchrun started 4"),
        ({"ep": 3}, r"etp=1 \* ep=3 \* pp=1 = 3 ranks for one replica of the experts, but torchrun started 4"),
        ({"cp": 0}, r"ParallelSizes: cp = 0: expected at least 1"),
    ],
)
def test_sizes_that_do_not_fit_the_world_say_what_to_change(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RankGrid(ParallelSizes(**sizes), 4)
