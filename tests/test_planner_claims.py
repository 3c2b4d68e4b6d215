"""The page on planning has the tables as they are computed; the pipeline's cut is the best there is."""

from __future__ import annotations

from itertools import combinations_with_replacement
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.predicted import points, show, wire
from planner.claims.__main__ import TABLES
from planner.pipeline import cut

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "planning.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_claims_stand_on_the_page_as_computed(name: str) -> None:
    assert TABLES[name]() in PAGE


def test_errors_stand_on_the_page_as_computed() -> None:
    assert show.table(list(points.points())) in PAGE


def test_what_a_window_could_win_stands_on_the_page_as_computed() -> None:
    assert wire.table() in PAGE


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.lists(st.floats(0.5, 4), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_no_cut_is_faster(layers: list[float], devices: list[float]) -> None:
    """Than the fastest of all cuts."""

    def slowest(inner: tuple[int, ...]) -> float:
        bounds = (0, *inner, len(layers))
        return max(sum(layers[bounds[i] : bounds[i + 1]]) / speed for i, speed in enumerate(devices))

    every = combinations_with_replacement(range(len(layers) + 1), len(devices) - 1)
    found = cut(layers, devices)
    assert found.seconds == pytest.approx(min(map(slowest, every)))
    assert found.ends[-1] == len(layers) and list(found.ends) == sorted(found.ends)


def test_a_pipeline_by_hand() -> None:
    found = cut([1.0, 1.0, 2.0, 2.0], [1.0, 2.0])
    assert (found.ends, found.seconds) == ((2, 4), 2.0)
    assert found.rate(4, 3) == pytest.approx(4 * 3 / (2.0 * 4))
    assert cut([1.0, 1.0], [1.0, 1.0], transfer=5.0).seconds == 5.0
    with pytest.raises(ValueError, match="one layer at least"):
        cut([], [1.0])
