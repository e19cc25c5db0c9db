"""Token ids without a row in the embedding, and rows that a batch holds several times: the same on every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import run_ranks
from small_run import write_run

from megatron_rl.rollout.base import sample_seed

pytestmark = pytest.mark.distributed
PROGRAM = Path(__file__).with_name("bad_tokens_program.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("bad_tokens")
    write_run(folder)
    return json.loads(run_ranks(PROGRAM, 2, str(folder / "model")).splitlines()[-1])


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_every_rank_refuses_a_token_that_the_model_has_no_row_for(found, layout):
    for case, token in {"above": 16, "below": -3}.items():
        for error in found[f"{layout} {case}"]:
            assert f"token id {token}, outside the model's vocabulary of 16" in error
    assert found[f"{layout} fine"] == ["none", "none"]


def test_each_occurrence_of_a_row_has_a_seed_of_its_own_whatever_the_layout(found):
    first, second = found["tp2 seeds"]
    assert found["dp2 seeds"] == [first, second]
    assert len({*first, *second}) == 16
    # Where no row comes twice, seeds are what they always were.
    assert [first[0], first[1], first[6]] == [sample_seed(0, 0, index) for index in (0, 1, 2)]


def test_equal_rows_are_answered_differently_and_the_same_on_every_layout(found):
    """Also where a step is answered in parts."""
    assert found["dp2 answers"] == found["tp2 answers"]
    assert len(set(map(tuple, found["tp2 answers"]))) >= 14
