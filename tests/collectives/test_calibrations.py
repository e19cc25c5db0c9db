"""Costs kept from run to run: what is read is what was written, and a damaged file is measured anew."""

from __future__ import annotations

import logging

import pytest

from megatron_rl.collectives import calibrations
from megatron_rl.collectives.calibrations import Calibrations, saved_choices
from megatron_rl.collectives.cost_model import HIERARCHICAL, LIBRARY, Cost
from megatron_rl.run import environment

MB = 1 << 20
COSTS = {LIBRARY: Cost(((MB, 0.0052), (4 * MB, 0.0178))), HIERARCHICAL: Cost(((MB, 0.003), (4 * MB, 0.0062)))}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrations, "cache_folder", lambda: tmp_path)
    return tmp_path / "collectives"


def test_costs_come_back_for_their_topology_and_collective_alone():
    kept = Calibrations("2 nodes of 8 ranks (a, b)")
    kept.save("all_reduce", COSTS)
    kept.save("all_gather", {LIBRARY: Cost(((MB, 0.1),)), HIERARCHICAL: Cost(((MB, 0.2),))})
    again = Calibrations("2 nodes of 8 ranks (a, b)")
    assert again.load("all_reduce") == COSTS
    assert again.load("all_gather") != COSTS
    assert again.load("reduce_scatter") is None
    assert Calibrations("2 nodes of 8 ranks (a, c)").load("all_reduce") is None


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}"]
    + [
        f'{{"topology": "x", "seconds": {{"all_reduce": {{"library": {samples}}}}}}}'
        for samples in ("3", "[]", "[[1]]")
    ],
)
def test_a_damaged_file_is_named_and_written_anew(content, folder, caplog):
    kept = Calibrations("x")
    folder.mkdir()
    kept.path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert kept.load("all_reduce") is None
    assert str(kept.path) in caplog.text
    assert list(saved_choices()) == [f"{kept.path} is damaged: delete it"]
    kept.save("all_reduce", COSTS)
    assert kept.load("all_reduce") == COSTS


def test_a_folder_that_cannot_be_made_is_a_warning(folder, caplog):
    folder.write_text("a file")
    Calibrations("x").save("all_reduce", COSTS)
    assert "the calibration of all_reduce is not kept" in caplog.text


def test_info_shows_the_choice_for_each_size():
    Calibrations("2 nodes of 8 ranks (a, b)").save("all_reduce", COSTS)
    shown = environment.describe_environment().split("as calibrated")[1].splitlines()
    assert shown[1].strip() == "2 nodes of 8 ranks (a, b)"
    # 1 MB: 5.2 ms against 3.0; the table has 1, 4, 16, 64 and 256 MB.
    assert "1 MB hierarchical: 3.00 ms predicted, library 5.20 ms" in shown[2]
    assert len(shown) == 7
