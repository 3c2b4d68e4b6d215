"""The simulator against every stored training step, and built-in models against published sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.predicted import show
from benchmarks.predicted.lab import FITTED_ON, HEADERS, Lab
from benchmarks.predicted.points import Point, points, summary
from benchmarks.predicted.rounds import Rounds
from benchmarks.records import RESULTS
from benchmarks.training.gpt import GPT
from planner import models
from planner.codecs import codec
from planner.simulate import Method, step

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
    found = list(points())
    assert not {point.file for point in found} & set(FITTED_ON)
    assert {point.workers for point in found} == {2, 4} and {point.workload for point in found} == {"gpt", "digits"}
    total = summary(found)
    assert total.points > 500 and total.median <= 0.05 and total.p90 <= 0.14, show.table(found)


def test_a_summary_by_hand() -> None:
    def point(cell: int, strategy: str, predicted: float, took: dict[str, list[float]]) -> Point:
        rounds = Rounds.of(cell_of(took))
        return Point("f", cell, 2, "1gbit", "gpt", strategy, rounds.seconds(strategy), predicted, rounds)

    sure = {"none": [0.5] * 4, "ddp": [1.0] * 4, "dear": [0.9] * 4}
    right = [point(0, "ddp", 1.1, sure), point(0, "dear", 0.99, sure)]
    wrong = [point(1, "ddp", 0.8, sure), point(1, "dear", 0.9, sure)]
    found = summary(right + wrong)
    assert (found.points, found.cells, found.first, found.level, found.repeats) == (4, 2, 0.5, 0.5, 1.0)
    assert found.median == pytest.approx(0.1) and found.p90 == pytest.approx(0.2)
    unsure = {"none": [0.5] * 4, "ddp": [1.0, 0.7, 1.0, 0.7], "dear": [0.7, 0.9, 0.6, 0.9]}
    found = summary([point(0, "ddp", 0.8, unsure), point(0, "dear", 0.9, unsure)])
    assert (found.first, found.level, found.repeats) == (0.0, 1.0, 0.0), "each round says something else"


def cell_of(took: dict[str, list[float]]) -> dict[str, Any]:
    """A measured cell: seconds by strategy and round, a step each on two ranks."""
    blocks = {
        name: [{"round": number, "ms": [[1e3 * each], [900 * each]]} for number, each in enumerate(own)]
        for name, own in took.items()
    }
    return {"strategies": [{"name": name, "failure": None, "blocks": own} for name, own in blocks.items()]}


def test_a_strategy_counts_by_what_it_takes_beyond_the_floor_of_its_round() -> None:
    rounds = Rounds.of(cell_of({"none": [0.5, 0.6, 0.7], "ddp": [0.9, 1.0, 1.1]}))
    assert rounds.floor == pytest.approx(0.6) and rounds.seconds("ddp") == pytest.approx(1.0)
    assert rounds.told_apart("none", "ddp") and rounds.halves(["ddp"], 1.03) is None, "three rounds have no halves"


def test_how_unsteady_a_machine_was_is_what_its_floor_says() -> None:
    def point(cell: int, floors: list[float]) -> Point:
        rounds = Rounds.of(cell_of({"none": floors, "ddp": [1.0] * len(floors)}))
        return Point("f", cell, 2, "1gbit", "gpt", "ddp", 1.0, 1.0 + cell, rounds)

    steady, unsteady = point(0, [0.5, 0.54]), point(1, [0.5, 0.6, 0.55])
    assert steady.rounds.swing == pytest.approx(0.08) and unsteady.rounds.swing == pytest.approx(0.2)
    quiet = [row for row in show.table([steady, unsteady]).splitlines() if row.startswith("| quiet machine")]
    assert len(quiet) == 2 and all("| 1 | 0.0% | 0.0% |" in row for row in quiet)
    rows = show.cells([steady, unsteady]).splitlines()
    assert rows[2:] == ["| f | 2 | 1gbit | gpt | 1 | +0.0% | 8% |", "| f | 2 | 1gbit | gpt | 1 | +100.0% | 20% |"]
    assert "quiet" not in show.table([unsteady])


def test_small_messages_pass_a_shaped_link_at_once() -> None:
    """The lab's token bucket: 72 KiB after a pause, at 100 Mbit/s 5.9 ms of the link."""
    lab = Lab.read(RESULTS)
    network = lab.network("100mbit", 2)
    assert network.bursts == {"link": pytest.approx(72 * 1024 / 12.5e6)}
    assert lab.network("10gbit", 2).bursts == {"link": 256e-6} and lab.network("unlimited", 2).bursts == {"link": 0.0}
    model = models.built_in("digits").profile(0.01)
    shaped = step(model, network, lab.machine(2), Method("hook", codec("sign"))).seconds
    plain = step(model, replace(network, bursts={}), lab.machine(2), Method("hook", codec("sign"))).seconds
    sent = 2 * 0.5 * model.bytes / 32 * HEADERS / 12.5e6
    assert plain - shaped == pytest.approx(sent, rel=1e-6), "all of it is in the bucket"
