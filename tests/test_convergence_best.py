"""Losses at each method's own best learning rate, from cells that are written by hand."""

import pytest
from rich.console import Console

from benchmarks.convergence import best
from benchmarks.convergence.__main__ import courses
from benchmarks.training.strategies import StrategyError, parse_strategies


def cell(strategy, learning_rate, seed, held_out, optimizer="adamw", failure=None, bytes_per_step=1000):
    plan = {"strategy": strategy, "learning_rate": learning_rate, "seed": seed, "optimizer": optimizer,
            "workload": "digits", "steps": 30}  # fmt: skip
    return {"plan": plan, "workers": 2, "failure": failure, "held_out": held_out, "bytes_per_step": bytes_per_step}


CELLS = [
    cell("ddp", 0.1, 1, [[10, 3.0], [20, 2.0], [30, 1.5]]),
    cell("ddp", 0.1, 2, [[10, 3.2], [20, 2.2], [30, 1.7]]),
    cell("ddp", 0.2, 1, [[10, 3.0], [20, 2.5], [30, 1.0]]),
    cell("ddp", 0.2, 2, [], failure="Rank 1 died"),
    cell("acp:4", 0.1, 1, [[10, 3.0], [20, 2.0], [30, 1.9]], bytes_per_step=100),
    cell("acp:4", 0.1, 2, [[10, 3.0], [20, 2.0], [30, 1.9]], bytes_per_step=100),
    cell("acp:4", 0.2, 1, [[10, 2.6], [20, 1.8], [30, 1.4]], bytes_per_step=100),
    cell("acp:4", 0.2, 2, [[10, 2.6], [20, 1.8], [30, 1.4]], bytes_per_step=100),
    cell("acp:4", 0.4, 1, [[10, 5.0], [20, 5.0], [30, 5.0]], bytes_per_step=100),
    cell("acp:4", 0.4, 2, [[10, 5.0], [20, 5.0], [30, 5.0]], bytes_per_step=100),
]


def test_each_method_has_its_own_learning_rate():
    dense, acp = best.best(CELLS)
    assert (dense.learning_rate, dense.loss, dense.at_an_end) == (0.1, pytest.approx(1.6), True)  # 0.2 lost a seed
    assert (acp.learning_rate, acp.held_out, acp.at_an_end) == (0.2, (1.4, 1.4), False)
    assert acp.steps_to_dense == pytest.approx(25) and dense.steps_to_dense == pytest.approx(30)
    assert acp.seconds_to_dense(0.1, 8e3) == pytest.approx(25 * 0.2)  # 0.1 s computing, 100 bytes at 1000 bytes/s
    assert best.best(CELLS[4:])[0].steps_to_dense is None  # dense was not trained


def test_the_table_names_predictions():
    console = Console(width=160, record=True)
    best.show(CELLS, 0.1, ["100mbit", "unlimited"], console)
    text = console.export_text()
    assert "PREDICTED" in text and "0.2" in text and "0.8750" in text and "never" not in text


def test_rates_and_curves():
    assert best.bits("100mbit") == 1e8 and best.bits("1gbit") == 1e9 and best.bits("unlimited") == float("inf")
    assert best.steps_to([(10, 1.0)], 2.0) == 10 and best.steps_to([(10, 3.0), (20, 2.5)], 2.0) is None


def test_courses_are_all_combinations(monkeypatch):
    from benchmarks.convergence.__main__ import arguments

    monkeypatch.setattr("sys.argv", ["x", "--strategies", "ddp,power:4", "--lr", "1e-3,2e-3", "--optimizers",
                                     "sgd,adamw", "--seeds", "1,2", "--workload", "digits"])  # fmt: skip
    found = courses(arguments())
    assert len(found) == 16 and "power:4 sgd lr 0.002 seed 2" in found
    assert {(c.strategy, c.optimizer, c.learning_rate, c.seed) for c in found.values()} == {
        (s, o, lr, seed) for s in ("ddp", "power:4") for o in ("sgd", "adamw") for lr in (1e-3, 2e-3) for seed in (1, 2)
    }


def test_fractions_and_presets_are_spelled():
    named = {one.name: one.compressor.make() for one in parse_strategies("power:0.125,acp:8,safe,dear+fast:2")}
    assert named["power:0.125"].rank == 0.125 and named["acp:8"].rank == 8
    assert named["safe"].rank == "auto" and named["dear+fast:2"].rank == 1 / 32
    for wrong in ("power:1.0", "acp:0", "safe:a"):
        with pytest.raises(StrategyError):
            parse_strategies(wrong)
