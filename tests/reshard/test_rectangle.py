"""Rectangle arithmetic against counting single elements."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest

from megatron_rl.reshard.rectangle import Rectangle, cross, disjoint_parts, uncovered


def elements(rectangle: Rectangle) -> set[tuple[int, int]]:
    rows, cols = range(rectangle.row_start, rectangle.row_stop), range(rectangle.col_start, rectangle.col_stop)
    return {(row, col) for row in rows for col in cols}


def random_rectangles(rng: Random, count: int) -> tuple[Rectangle, ...]:
    found = set()
    while len(found) < count:
        top, left = rng.randrange(8), rng.randrange(6)
        found.add(Rectangle(top, rng.randint(top + 1, 8), left, rng.randint(left + 1, 6)))
    return tuple(found)


@pytest.mark.parametrize("seed", range(30))
def test_disjoint_parts_cover_each_element_once_and_know_whose_it_is(seed: int) -> None:
    rectangles = random_rectangles(Random(seed), 1 + seed % 6)
    parts = disjoint_parts(rectangles)
    seen: dict[tuple[int, int], tuple[int, ...]] = {}
    for part in parts:
        for element in elements(part.rectangle):
            assert element not in seen
            seen[element] = part.inside
    expected = {
        e: tuple(i for i, r in enumerate(rectangles) if e in elements(r)) for r in rectangles for e in elements(r)
    }
    assert seen == expected


def test_disjoint_rectangles_stay_as_they_are() -> None:
    halves = (Rectangle(4, 8, 0, 3), Rectangle(0, 4, 0, 3))
    assert [part.rectangle for part in disjoint_parts(halves)] == list(halves)


@pytest.mark.parametrize("seed", range(20))
def test_cross_finds_every_intersection(seed: int) -> None:
    rng = Random(seed)
    left, right = random_rectangles(rng, 4), random_rectangles(rng, 3)
    found = {(c.left, c.right): elements(c.rectangle) for c in cross(left, right)}
    expected = {
        (i, j): elements(a) & elements(b)
        for i, a in enumerate(left)
        for j, b in enumerate(right)
        if elements(a) & elements(b)
    }
    assert found == expected


@pytest.mark.parametrize("seed", range(20))
def test_intersection_holds_the_elements_of_both_and_nothing_is_none(seed: int) -> None:
    rng = Random(seed)
    for a, b in itertools.product(random_rectangles(rng, 4), random_rectangles(rng, 3)):
        found = a.intersection(b)
        assert (elements(found) if found else set()) == elements(a) & elements(b)
        assert found is None or found.numel
        assert b.intersection(a) == found


def test_slices_cut_the_elements_out_of_a_matrix() -> None:
    matrix = np.arange(48).reshape(8, 6)
    part = Rectangle(2, 5, 1, 3)
    assert set(matrix[part.slices].flat) == {matrix[at] for at in elements(part)}


def test_a_moved_rectangle_keeps_its_size() -> None:
    assert Rectangle(2, 5, 1, 3).moved(7, 0) == Rectangle(7, 10, 0, 2)


@pytest.mark.parametrize("seed", range(20))
def test_uncovered_names_a_hole_exactly_when_there_is_one(seed: int) -> None:
    rng = Random(seed)
    (wanted,), holders = random_rectangles(rng, 1), random_rectangles(rng, 5)
    missing = elements(wanted) - {e for holder in holders for e in elements(holder)}
    hole = uncovered(wanted, holders)
    assert (hole is None) == (not missing)
    assert hole is None or elements(hole) <= missing
