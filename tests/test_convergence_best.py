"""Losses at each method's own best learning rate, from cells that are written by hand."""

import math

import pytest
import reported
import torch
from rich.console import Console

from benchmarks import records
from benchmarks.convergence import best, schedules
from benchmarks.convergence.__main__ import courses
from benchmarks.network.rates import bits
from benchmarks.report import comparison, sweeps
from benchmarks.report.evidence import Evidence
from benchmarks.training.strategies import StrategyError, parse_strategies


def cell(strategy, learning_rate, seed, held_out, optimizer="adamw", failure=None, bytes_per_step=1000):
    experiment = {"strategy": strategy, "learning_rate": learning_rate, "seed": seed, "optimizer": optimizer,
            "workload": "digits", "steps": 30}  # fmt: skip
    return {
        "plan": experiment,
        "workers": 2,
        "failure": failure,
        "held_out": held_out,
        "bytes_per_step": bytes_per_step,
    }


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


def test_a_seed_that_is_hard_for_all_is_no_methods_loss():
    hard = [cell("ddp", 0.1, 3, [[10, 9.0], [20, 9.0], [30, 9.0]])]
    dense, acp = best.best([one for one in CELLS if one["plan"]["learning_rate"] != 0.4] + hard)
    assert dense.seeds == (1, 2, 3) and acp.over(dense, least=2) == pytest.approx(2.8 / 3.2)
    assert acp.over(dense, least=3) is None


def test_the_table_names_predictions():
    console = Console(width=160, record=True)
    best.show(CELLS, 0.1, ["100mbit", "unlimited"], console)
    text = console.export_text()
    assert "PREDICTED" in text and "0.2" in text and "0.8750" in text and "never" not in text


def test_rates_and_curves():
    assert bits("100mbit") == 1e8 and bits("1gbit") == 1e9 and bits("unlimited") == float("inf")
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
    assert named["safe"].dtype == torch.int3 and named["dear+fast:2"].rank == [(0, "2x"), (1000, "8x")]
    for wrong in ("power:1.0", "acp:0", "safe:a"):
        with pytest.raises(StrategyError):
            parse_strategies(wrong)


def test_a_loss_that_is_not_finite_is_no_result():
    (only,) = best.best([cell("ddp", 0.1, 1, [[10, 3.0], [20, 2.0]]), cell("ddp", 0.2, 1, [[10, 3.0], [20, math.nan]])])
    assert (only.learning_rate, only.seeds) == (0.1, (1,))


def test_schedules_begin_low_and_end_at_nothing():
    assert [round(schedules.cosine(done), 6) for done in (0.0, 0.025, 0.05, 0.525, 1.0)] == [0, 0.5, 1, 0.5, 0]
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    (one,) = schedules.schedulers("cosine", sgd, 99)
    rates = []
    for _ in range(99):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        one.step()
    assert 0 < rates[0] < rates[1] and max(rates) == pytest.approx(2.0) and 0 < rates[-1] < 0.01
    assert schedules.SCHEDULES["constant"](0.5) == 1


def test_options_of_compressors_are_spelled_with_their_names():
    (one,) = parse_strategies("dear+power:4x:start=warmup:exempt=head+*.bias:2")
    made = one.compressor.make()
    assert (one.bucket_cap_mb, made.rank, made.start.given) == (2.0, "4x", "warmup")
    assert made.exempt.patterns == ("head", "*.bias")
    assert str(one.compressor) == "power:4x:start=warmup:exempt=head+*.bias"
    for wrong in ("power:4:begin=1", "power:4:start=", "power:4:start=soon", "power:x", "topk:4x"):
        with pytest.raises(StrategyError):
            parse_strategies(wrong)


def sweep_of(cells):
    (found,) = sweeps.sweeps([records.Source("a.json", "convergence", {"cells": cells})])
    return found


def test_files_of_several_learning_rates_are_sweeps():
    source = records.Source("a.json", "convergence", {"cells": CELLS})
    assert sweeps.is_sweep(source) and not sweeps.is_sweep(records.Source("a.json", "training", {"cells": CELLS}))
    assert not sweeps.is_sweep(records.Source("a.json", "convergence", {"cells": CELLS[:2]}))
    known = Evidence.of([source])
    assert known.swept() == [source] and known.of_benchmark("convergence") == []


def test_methods_are_compared_over_the_seeds_that_both_have():
    found = sweep_of([*CELLS, cell("power:4", 0.1, 2, [[10, 3.0], [20, 1.9], [30, 1.87]], bytes_per_step=50)])
    dense, acp, power = found.rows
    assert (found.fewer(acp), found.fewer(dense), found.fewer(power)) == (5, 0.5, 10)
    assert found.above(acp) == pytest.approx(1.4 / 1.6) and found.above(power) == pytest.approx(1.87 / 1.7)
    assert found.reached(acp, 1) == pytest.approx(25) and found.reached(power, 1) is None  # other seeds
    lines = sweeps.loss_table(found).splitlines()
    assert lines[3].startswith("| acp:4 | 0.2 | 2 | 1.400 | 1.400–1.400 | -12.5% | 5.0× | 25 |")
    assert lines[4].endswith("| +10.0% | 10.0× |  |  |")


def test_methods_that_are_not_offered_have_a_table_of_their_own():
    tried = cell("tried:acp:8:start=10", 0.1, 1, [[10, 3.0], [20, 1.9], [30, 1.65]], bytes_per_step=100)
    found = sweep_of([*CELLS, tried])
    assert [one.strategy for one in found.rows] == ["ddp", "acp:4"]
    (one,) = found.tried
    assert found.fewer(one) == pytest.approx(500 / (1000 / 3 + 100 * 2 / 3))  # the dense steps are counted
    assert sweeps.tried_table(found).splitlines()[2:] == [
        "| tried:acp:8:start=10 | 0.1 | 1 | 1.650 |  | +10.0% | 5.0× |"
    ]


def test_times_are_combined_from_steps_and_bytes():
    steps = {name: ms for name, ms in reported.STEPS.items() if name != "acp:4"}
    payload = reported.training(rate="500mbit", steps=steps)
    payload["cells"][0]["workers"] = 4
    cells = sweeps.with_floor(comparison.cells([records.Source("training-x.json", "training", payload)]))
    line = sweeps.time_table(cells, sweep_of(CELLS), "acp:4").splitlines()[2]
    own = 150 + 12.5e6 / 2 / 5 * 8 / 500e6 * 1e3  # ms: the floor's median of two rounds, and bytes at 500 Mbit/s
    dense, reached = 20 + 10 * (2.1 - 1.608) / 0.5, 20 + 5 * (1.8 - 1.608) / 0.2
    fields = line.split(" | ")
    assert fields[2:5] == ["240 (ddp+fp16:4)", f"{own:.0f}, PREDICTED", f"{240 / own:.2f}×"]
    assert float(fields[5].rstrip("× |")) == pytest.approx(240 / own * dense / reached, rel=0.1)


def test_a_measured_step_counts_in_place_of_a_predicted_one():
    steps = reported.STEPS | {"dear+acp:4:2": 110.0, "acp:8": 10.0}
    payload = reported.training(rate="500mbit", steps=steps)
    cells = comparison.cells([records.Source("training-x.json", "training", payload)])
    fields = sweeps.time_table(cells, sweep_of(CELLS), "acp:4").splitlines()[2].split(" | ")
    assert fields[2:5] == ["240 (ddp+fp16:4)", "165 (dear+acp:4:2)", "1.45×"]  # of rounds of 160 and 320, 110 and 220


def test_the_dense_steps_of_a_start_are_counted():
    started = [cell(f"acp:4:start={start}", 0.1, 1, [[30, 1.6]], bytes_per_step=100) for start in (15, "warmup")]
    found = sweep_of([*CELLS, *started])
    fewer = {one.strategy: found.fewer(one) for one in found.rows}
    assert fewer["acp:4:start=15"] == pytest.approx(500 / 550)  # half of 30 steps at 1000 bytes, half at 100
    assert fewer["acp:4:start=warmup"] is None and fewer["acp:4"] == 5
