"""Training with compressors: strategies, losses by step, workloads, a step broken down, bandwidth needed."""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from canned import strategy, training_cell
from rich.console import Console

from benchmarks import losses, records
from benchmarks.bandwidth import measure as bandwidth
from benchmarks.bandwidth import show as bandwidth_table
from benchmarks.convergence import show as convergence
from benchmarks.launch import WorkersFailed
from benchmarks.network.rates import bits, parse_rate
from benchmarks.training import breakdown, tradeoff
from benchmarks.training.data import digits
from benchmarks.training.strategies import Compressed, DDPPowerSGD, DearCompressed, StrategyError, parse_strategies
from benchmarks.training.workloads import WORKLOADS, MissingPackage, parts, repeated_blocks

ROOT = Path(__file__).resolve().parent.parent


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


@pytest.fixture
def cell() -> dict[str, Any]:
    return training_cell()


# Strategies


def test_compressor_strategies_are_parsed() -> None:
    found = parse_strategies(
        "acp:8,acp:4:2.5,topk:0.01,sign,sign:majority,sign:4,dear+sign:majority:2,dear+bf16,fp16:1"
    )
    kinds = [(one.compressor.kind, one.compressor.option) for one in found if isinstance(one, Compressed)]
    assert kinds[:4] == [("acp", "8"), ("acp", "4"), ("topk", "0.01"), ("sign", None)]
    assert kinds[4:] == [("sign", "majority"), ("sign", None), ("sign", "majority"), ("bf16", None), ("fp16", None)]
    assert [one.bucket_cap_mb for one in found] == [None, 2.5, None, None, None, 4.0, 2.0, None, 1.0]
    assert [isinstance(one, DearCompressed) for one in found] == [False] * 6 + [True, True, False]
    (torchs,) = parse_strategies("ddp+powersgd:8")
    assert isinstance(torchs, DDPPowerSGD) and torchs.rank == 8
    bad = (
        "acp",
        "acp:0",
        "acp:x",
        "acp:4:1:2",
        "topk:2",
        "topk:0",
        "sign:minority",
        "bf16:a",
        "dear+none",
        "dear+ddp:1",
    )
    for wrong_name in (*bad, "ddp+powersgd:0", "ddp+powersgd:4:1", "power:257"):
        with pytest.raises(StrategyError, match="the forms are"):
            parse_strategies(wrong_name)


def test_a_named_compressor_is_what_it_says() -> None:
    names = "acp:8,power:2,topk:0.02,sign:majority,bf16,int8,fp8"
    made = {one.name: one.compressor.make() for one in parse_strategies(names)}  # type: ignore[attr-defined]
    assert made["acp:8"].rank == 8 and made["power:2"].rank == 2 and made["topk:0.02"].density == 0.02
    assert made["sign:majority"].vote == "majority" and made["bf16"].dtype == torch.bfloat16
    assert made["int8"].dtype == torch.int8 and made["fp8"].dtype == torch.float8_e4m3fn


# Losses, times and rates, from canned results


def course(strategy: str, seed: int, held_out: float, **more: Any) -> dict[str, Any]:
    experiment = {
        "strategy": strategy,
        "seed": seed,
        "workload": "gpt",
        "steps": 3,
        "batch": 4,
        "optimizer": "adamw",
        "learning_rate": 1e-3,
    }
    trained = {"losses": [9.0] * 5 + [held_out] * losses.LAST, "held_out": [[1, 5.0], [3, held_out]]}
    return {"plan": experiment, "workers": 2, "failure": None, **trained, **more}


def test_losses_are_compared_with_dense_seed_by_seed() -> None:
    cells = [course("ddp", 1, 2.0), course("acp:8", 1, 2.02), course("ddp", 2, 4.0), course("acp:8", 2, 4.2)]
    cells += [course("sign", 1, 2.0), {**course("sign", 2, 0.0), "failure": "rank 0: no"}]
    dense, acp, sign = losses.rows(cells)
    assert dense.ratio == 1 and acp.held_out == pytest.approx(3.11) and acp.training == pytest.approx(3.11)
    assert acp.ratio == pytest.approx((1.01 + 1.05) / 2)
    assert acp.worst == pytest.approx(1.05) and acp.worst_seed == 2
    assert sign.seeds == 1 and sign.failures == ("seed 2: rank 0: no",)
    console = Console(width=120, record=True, file=io.StringIO())
    convergence.show(cells, console)
    text = console.export_text()
    assert "1.050 (2)" in text and "sign failed, seed 2: rank 0: no" in text


def test_compression_that_costs_more_than_it_saves_is_pointed_out(cell: dict[str, Any]) -> None:
    def compressed(name: str, encode_ms: float | None) -> dict[str, Any]:
        report = {"dense_bytes": 12_500_000, "encode_ms": encode_ms, "merge_ms": 5.0, "decode_ms": 15.0}
        made = strategy(name, [[100.0, 100.0]], payload_bytes_per_step=2_500_000)
        made["blocks"][0]["compressor"] = [report, report]
        return made

    cell["strategies"] += [compressed("acp:4", 10.0), compressed("sign", 141.0), compressed("topk:0.01", None)]
    acp, sign, topk = tradeoff.compressions(cell)
    assert acp.saved == sign.saved == pytest.approx(160)  # 10 MB at 500 Mbit/s
    assert (acp.spent, acp.loses, sign.spent, sign.loses) == (30, False, 161, True)
    assert (topk.spent, topk.loses) == (None, None)
    console = Console(width=120, record=True, file=io.StringIO())
    tradeoff.show(cell, console)
    assert "-1.0, loses" in console.export_text()


def span(step: int, phase: str, name: str, start: float, end: float) -> dict[str, Any]:
    return {"step": step, "phase": phase, "name": name, "start": int(start * 1e6), "end": int(end * 1e6)}


def lane(lane: str, name: str, start: float, end: float) -> dict[str, Any]:
    return {"lane": lane, "name": name, "start": int(start * 1e6), "end": int(end * 1e6)}


def canned_step(step: int, begin: float) -> list[dict[str, Any]]:
    """40 ms: forward of a and b 10 ms, backward of b and a 20 ms, update 10 ms."""
    marks = [
        ("forward", "a", 4),
        ("forward", "b", 6),
        ("backward", "b", 12),
        ("backward", "a", 8),
        ("update", "update", 10),
    ]
    found = []
    for phase, name, length in marks:
        found.append(span(step, phase, name, begin, begin + length))
        begin += length
    return found


def test_a_step_is_broken_down_into_what_took_how_long() -> None:
    compute = [each for step in range(3) for each in canned_step(step, 40 * step)]
    lanes = [
        *(lane("wait", "all-gather of group 0", 40 * step + 1, 40 * step + 3) for step in range(3)),  # in forward of a
        *(lane("wait", "reduce-scatter of group 0", 40 * step + 30, 40 * step + 33) for step in range(3)),
        *(lane("update", "group 0", 40 * step + 33, 40 * step + 38) for step in range(3)),
        *(lane("all-gather", "group 0", 40 * step - 5, 40 * step + 3) for step in range(3)),
        *(lane("reduce-scatter", f"group {g}", 40 * step + 20, 40 * step + 33) for step in range(3) for g in (0, 1)),
    ]
    found = breakdown.account(compute, lanes, [{"encode_ms": 2.0, "decode_ms": None}])
    assert found["step_ms"] == 40 and found["steps"] == 1  # the first and the last are left out
    assert found["phases"] == {
        "forward": 8, "backward": 20, "optimizer": 5, "scheduler": 2, "encode": 2, "merge": None, "decode": None,
        "exposed_reduce_scatter": 3, "exposed_all_gather": 2, "exposed_other": 0,
    }  # fmt: skip
    assert found["modules"][0] == {"name": "a", "forward_ms": 2, "backward_ms": 8}
    reduce = next(one for one in found["operators"] if one["name"] == "reduce-scatter")
    assert reduce == {"name": "reduce-scatter", "count": 2, "in_flight_ms": 13, "exposed_ms": 3}


def test_a_plain_hooks_wait_is_taken_out_of_backward_where_it_is_known() -> None:
    compute = [each for step in range(3) for each in canned_step(step, 40 * step)]
    known = breakdown.account(compute, None, [{"exposed_ms": 5.0}])
    assert (known["phases"]["backward"], known["phases"]["exposed_other"]) == (15, 5)
    last = [span["name"] for span in compute if span["phase"] == "backward"][-1]
    unknown = breakdown.account(compute, None, [{}])
    for part, whole in zip(known["modules"], unknown["modules"], strict=True):
        assert whole["backward_ms"] - part["backward_ms"] == (5 if part["name"] == last else 0)
    assert (unknown["phases"]["backward"], unknown["phases"]["exposed_other"]) == (20, None)
    assert unknown["operators"] is None and unknown["phases"]["optimizer"] == 10


def test_what_moves_while_nothing_computes_is_exposed() -> None:
    moves = [lane("communication", "all-reduce", 10, 30), lane("communication", "all-gather", 25, 50)]
    computes = [lane("", "mm", 0, 12), lane("", "mm", 12.1, 20), lane("", "add", 40, 45)]
    waits = [(wait["name"], wait["start"] / 1e6, wait["end"] / 1e6) for wait in breakdown.exposed(moves, computes)]
    assert waits == [("all-reduce", 20, 30), ("all-gather", 30, 40), ("all-gather", 45, 50)]  # 0.1 ms is no wait


def test_the_ladder_stops_where_a_strategy_stops_holding_and_bisects_once() -> None:
    needs = {"ddp": 900e6, "acp:4": 90e6, "sign": 5e9, "bad": 0.0}
    asked = []

    def measure(rate: str, names: Any) -> dict[str, float | None]:
        asked.append((rate, list(names)))
        return {n: None if n == "bad" else 1.1 if bits(rate) >= needs[n] else 1.3 for n in names}

    ddp, acp, sign, bad = bandwidth.search(list(needs), ["2gbit", "1gbit", "250mbit", "64mbit"], 1.15, measure)
    assert (ddp.holds, ddp.fails) == ("1gbit", "500000kbit")  # 250 Mbit/s, then the middle
    assert (acp.holds, acp.fails) == ("126491kbit", "64mbit")
    assert (sign.holds, sign.fails) == (None, "2gbit") and (bad.holds, bad.fails) == (None, "2gbit")
    assert [names for _, names in asked] == [
        list(needs),
        ["ddp", "acp:4"],
        ["ddp", "acp:4"],
        ["acp:4"],
        ["ddp"],
        ["acp:4"],
    ]
    console = Console(width=120, record=True, file=io.StringIO())
    bandwidth_table.show(4, 1.15, [ddp, acp, sign, bad], console)
    lines = [line for line in console.export_text().splitlines() if "/s" in line]
    assert ["acp:4" in lines[0], "ddp" in lines[1]] == [True, True]


def test_progress_never_counts_more_cells_than_it_promised() -> None:
    """The worst case: every strategy drops out at another rung, so that each has a gap of its own."""
    rates = ["2gbit", "1gbit", "500mbit", "250mbit"]
    measured: list[str] = []

    def measure(rate: str, names: Any) -> dict[str, float | None]:
        measured.append(rate)
        return {name: 1.1 if bits(rate) >= bits(name) else 1.3 for name in names}

    bandwidth.search(rates[:3], rates, 1.15, measure)
    title = str(next(bandwidth.parts(argparse.Namespace(workers=[4], rates=rates, strategies=rates[:3]))))
    assert title == "cell 1 of at most 7" and len(measured) == 7


def test_the_rate_in_the_middle_is_one_that_can_be_set() -> None:
    assert parse_rate(bandwidth.between("10gbit", "500mbit")) == pytest.approx(2236.068e6)


def test_step_over_floor_is_paired_by_round(cell: dict[str, Any]) -> None:
    assert bandwidth.over_floor(cell)["dear:sharded"] == pytest.approx((200 / 100 + 400 / 200) / 2)
    assert bandwidth.over_floor(cell)["fsdp2"] is None
    cell["strategies"][0]["failure"] = "no"
    with pytest.raises(WorkersFailed, match="compute floor at 500 Mbit/s: no"):
        bandwidth.over_floor(cell)


# Workloads


def test_digits_are_learned() -> None:
    workload = WORKLOADS["digits"]
    net, data = workload.build_seeded(1), digits()
    assert len(data.train[0]) + len(data.evaluation[0]) == 1797 and data.held_out(10_000)[0].shape == (360, 1, 8, 8)
    held_out = data.held_out(360)
    before = workload.loss(net(held_out[0]), held_out[1]).item()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(40):
        inputs, targets = data.batch(step, rank=0, world=1, batch=32, seed=1)
        workload.loss(net(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert workload.loss(net(held_out[0]), held_out[1]).item() < 0.5 * before


def test_a_workload_whose_package_is_missing_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingPackage, match="inception-v4 needs the package timm, which cannot be imported"):
        WORKLOADS["inception-v4"].build_seeded(1)


@pytest.mark.parametrize("name", WORKLOADS)
def test_synthetic_inputs_have_the_shape_of_their_model(name: str) -> None:
    data = WORKLOADS[name].data()
    inputs, targets = data.batch(7, rank=1, world=2, batch=2, seed=1)
    assert len(inputs) == len(targets) == 2 and targets.dtype == torch.int64
    if data.digest == "synthetic":
        assert data.held_out(4) is None and "synthetic inputs" in WORKLOADS[name].about
        assert not torch.equal(inputs, data.batch(7, rank=0, world=2, batch=2, seed=1)[0])


def test_a_model_is_cut_into_its_blocks() -> None:
    names = [name for name, _ in parts(WORKLOADS["gpt"].build_seeded(1))]
    assert names == ["bytes", "positions", *(f"blocks.{number}" for number in range(6)), "norm", "head"]
    assert len(repeated_blocks(WORKLOADS["gpt"].build_seeded(1))) == 6


# A real run, as small as it gets


@pytest.mark.slow
def test_convergence_resumes_where_it_was_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "l.json"
    common = ("convergence", "--seeds", "1", "--steps", "3", "--batch", "1", "--held-out-every", "2")
    common = (*common, "--held-out-examples", "4", "--json", str(path), "--resume", "--strategies")
    done = run(*common, "ddp")
    assert done.returncode == 0, done.stderr
    first = json.loads(path.read_text())
    first["cells"][0]["compressor"] = {"kept": True}
    records.write(path, first)
    done = run(*common, "ddp,acp:8")
    assert done.returncode == 0, done.stderr
    dense, acp = json.loads(path.read_text())["cells"]
    assert dense["compressor"] == {"kept": True}
    assert dense["losses"][0] == acp["losses"][0] and len(acp["losses"]) == 3
    assert [step for step, _ in acp["held_out"]] == [2, 3]
    ((step, share),) = acp["accuracy"]
    assert step == 3 and 0 < share < 1
    assert acp["compressor"]["bytes_sent"] * 4 < acp["compressor"]["dense_bytes"]
    done = run(*common, "ddp", "--lr", "0.1")  # another learning rate is another cell
    assert done.returncode == 0, done.stderr
    assert [cell["plan"]["learning_rate"] for cell in json.loads(path.read_text())["cells"]] == [0.0005, 0.0005, 0.1]
    done = run(*common, "ddp", "--batch", "2")
    assert done.returncode == 1 and "batch: 1 then, 2 now" in done.stderr
