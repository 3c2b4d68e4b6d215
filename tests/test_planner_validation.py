"""The simulator against every stored training step, and built-in models against published sizes."""

from __future__ import annotations

import pytest

from benchmarks.training.gpt import GPT
from planner import models, validation
from planner.lab import FITTED_ON, rate_bytes
from planner.validation import Point, summary

PUBLISHED = {
    "resnet50": 25_557_032,
    "densenet201": 20_013_928,
    "inception_v4": 42_679_816,
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-70b": 68_976_648_192,
}
OPERATIONS = {"resnet50": 4.09e9, "densenet201": 4.29e9, "inception_v4": 12.25e9}  # multiplications with an addition


def test_built_in_models_have_the_published_sizes() -> None:
    assert {name: make().parameters for name, make in models.MODELS.items()} == PUBLISHED
    for name, pairs in OPERATIONS.items():
        assert models.built_in(name).operations == pytest.approx(2 * pairs, rel=0.02)
    assert models.byte_gpt().parameters == sum(parameter.numel() for parameter in GPT().parameters())
    with pytest.raises(ValueError, match="Model 'vgg' is not built in"):
        models.built_in("vgg")


def test_a_profile_shares_a_step_out_by_operations() -> None:
    profile = models.built_in("bert-base").profile(0.3, 0.01)
    assert profile.forward == pytest.approx(0.1) and profile.backward == pytest.approx(0.2)
    assert profile.bytes == 4 * PUBLISHED["bert-base"]


def test_predictions_are_near_what_was_measured() -> None:
    """Over all that is stored, at 2 and 4 workers and every rate, except where constants come from."""
    found = list(validation.points())
    assert not {point.file for point in found} & set(FITTED_ON)
    assert {point.workers for point in found} == {2, 4} and {point.workload for point in found} == {"gpt", "digits"}
    total = summary(found)
    assert total.points > 500 and total.median <= 0.07 and total.p90 <= 0.15, validation.table(found)


def test_a_summary_by_hand() -> None:
    def point(cell: int, strategy: str, measured: float, predicted: float) -> Point:
        return Point("f", cell, 2, "1gbit", "gpt", strategy, measured, predicted)

    right = [point(0, "ddp", 1.0, 1.1), point(0, "dear", 0.9, 0.99)]
    wrong = [point(1, "ddp", 1.0, 0.8), point(1, "dear", 0.9, 0.9)]
    found = summary(right + wrong)
    assert (found.points, found.cells, found.first) == (4, 2, 0.5)
    assert found.median == pytest.approx(0.1) and found.p90 == pytest.approx(0.2)


def test_rates() -> None:
    assert rate_bytes("500mbit") == 62.5e6 and rate_bytes("2.5Gbit") == 312.5e6
    with pytest.raises(ValueError, match="'fast' is not a rate"):
        rate_bytes("fast")
