"""A training benchmark of several seeds: the cells it asks for, and the table over them."""

import io
import sys
from typing import Any

import pytest
from canned import strategy, training_cell
from rich.console import Console

from benchmarks import records
from benchmarks.report import comparison, repeats
from benchmarks.training import __main__ as training
from benchmarks.training import seeds


def cell(seed: int, step: float = 100.0, losses: tuple[float, ...] = (4.0, 2.0), held_out: float = 2.0) -> Any:
    """DDP at 200 ms, and one strategy that takes `step` ms in both its rounds and has these losses, its best last."""
    course = {"losses": list(losses), "clock_ms": [1000.0] * len(losses)}
    dense = {"losses": [4.0, 2.0], "clock_ms": [2000.0] * 2, "held_out_loss": 2.0}
    found = training_cell()
    found["plan"] |= {"seed": seed, "excluded": {}}
    found["variant"] = f"seed {seed}"
    found["strategies"] = [
        strategy("ddp:1", [[199.0], [199.0]], **dense),
        strategy("acp:4", [[step - 1], [step - 1]], held_out_loss=held_out, **course),
    ]
    return found


def test_numbers_are_averaged_and_their_range_shown() -> None:
    cells = [cell(1), cell(2, step=50.0, held_out=3.0)]
    (group,) = seeds.groups(cells)
    dense, ours = seeds.rows(group)
    assert ours.step and ours.step.values == (100.0, 50.0)
    assert ours.speedup and ours.speedup.values == (2.0, 4.0) and f"{ours.speedup:.1f}" == "3.0 (2.0-4.0)"
    assert ours.held_out_ratio and ours.held_out_ratio.values == (1.0, 1.5)
    assert dense.held_out_ratio and dense.held_out_ratio.values == (1.0, 1.0)


def test_the_loss_to_reach_is_one_that_every_seed_reaches() -> None:
    cells = [cell(1), cell(2, losses=(4.0, 4.0))]  # the second seed's mean loss never falls below 4
    assert seeds.target_loss(cells) == 4.0
    dense, ours = seeds.rows(cells)
    assert dense.seconds_to_loss and dense.seconds_to_loss.values == (2.0, 2.0)
    assert ours.seconds_to_loss and ours.seconds_to_loss.values == (1.0, 1.0)


def test_a_strategy_that_failed_with_one_seed_has_no_mean() -> None:
    cells = [cell(1), cell(2)]
    cells[1]["strategies"][1] |= {"failure": "no luck", "blocks": []}
    assert seeds.rows(cells)[1].step is None
    console = Console(file=io.StringIO(), width=120)
    seeds.show(cells, console)
    assert "failed with a seed" in console.file.getvalue()  # type: ignore[attr-defined]


def test_only_the_same_setting_with_several_seeds_has_a_table() -> None:
    other = cell(2) | {"rate": "1gbit"}
    assert seeds.groups([cell(1), other]) == []
    assert seeds.groups([cell(1), cell(1)]) == []
    assert [len(group) for group in seeds.groups([cell(1), other, cell(2), cell(3)])] == [3]
    console = Console(file=io.StringIO())
    seeds.show([cell(1), other], console)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_another_seed_is_not_the_same_table_again() -> None:
    def source(name: str, seed: int) -> records.Source:
        about = {"machine": {"cpu": "a"}, "when": name}
        one = cell(seed)
        one["plan"] |= {"batch": 4, "workload": "gpt"}
        return records.Source(name, "training", {"cells": [one], **about})

    runs = repeats.of_training(comparison.cells([source("a", 1), source("b", 2), source("c", 2)]))
    (twice,) = repeats.twice_measured(runs)
    assert (twice.first.file, twice.second.file) == ("b", "c")


@pytest.mark.parametrize(("given", "names"), [("1", [""]), ("3", [""]), ("1,3", ["seed 1", "seed 3"])])
def test_each_seed_is_a_plan(given: str, names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["training", "--seeds", given, "--breakdown"])
    experiments = training.experiments(training.arguments())
    assert list(experiments) == names
    assert [str(experiment.seed) for experiment in experiments.values()] == given.split(",")
    assert all(experiment.breakdown for experiment in experiments.values())
