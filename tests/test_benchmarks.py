"""The measuring part: statistics, tables from canned results, the workload, the command lines, a tiny real run."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from canned import training_cell
from rich.console import Console
from torch import nn
from workers import WorkerPool

from benchmarks import records, stats
from benchmarks.command import show_size, size
from benchmarks.demo import pictures
from benchmarks.demo import show as demo
from benchmarks.launch import WorkersFailed, run_workers
from benchmarks.network.lab import open_lab
from benchmarks.training import measure as training
from benchmarks.training import summary
from benchmarks.training.data import ByteText, places, shuffled, standard_library
from benchmarks.training.experiment import Experiment
from benchmarks.training.gpt import language_loss
from benchmarks.training.strategies import (
    FORMS,
    Dear,
    StrategyError,
    parse_strategies,
)
from benchmarks.training.trainer import optimizer_factory
from benchmarks.training.workloads import WORKLOADS
from benchmarks.worker import Worker
from planner import auto

ROOT = Path(__file__).resolve().parent.parent


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


# Statistics


def test_a_step_is_as_long_as_its_slowest_rank() -> None:
    assert stats.slowest_rank([[1.0, 5.0], [2.0, 3.0]]) == [2.0, 5.0]


def test_paired_ratio_cancels_drift() -> None:
    """The machine slows down threefold between rounds; ours stays 1.25 times as fast."""
    ours, theirs = [80.0, 160.0, 240.0], [100.0, 200.0, 300.0]
    assert stats.paired_ratio(ours, theirs) == 1.25


def test_written_json_is_whole_and_keeps_series_on_one_line(tmp_path: Path) -> None:
    payload = {"ms": [[1.5, -2e-05], [3.0, 4.0]], "names": ["a", "b"], "empty": []}
    records.write(tmp_path / "deep" / "x.json", payload)
    text = (tmp_path / "deep" / "x.json").read_text()
    assert json.loads(text) == payload
    assert "[ 1.5, -2e-05 ]" in text
    assert not list(tmp_path.glob("**/*.partial"))


def test_header_names_versions_and_no_place() -> None:
    header = records.header("training", {"workers": [2]})
    assert header["versions"]["torch"] == version("torch")
    assert header["machine"]["cores"] >= 1
    assert str(Path.home()) not in json.dumps(header) and str(ROOT) not in json.dumps(header["machine"])


# Tables, from canned results


@pytest.fixture
def cell() -> dict[str, Any]:
    return training_cell()


def test_summary_compares_with_the_best_plain_ddp(cell: dict[str, Any]) -> None:
    rows = {row.name: row for row in summary.summarise(cell)}
    assert [name for name, row in rows.items() if row.is_best_ddp] == ["ddp:1"]
    dear = rows["dear:sharded"]
    assert dear.median == 300
    assert dear.speedup == pytest.approx((250 / 200 + 450 / 400) / 2)
    assert dear.exposed == 150  # rounds: 200 - 100, 400 - 200
    assert dear.computed_communication == pytest.approx(200)  # 12.5 MB at 500 Mbit/s
    assert dear.of_bound == pytest.approx(100 * 200 / 300)
    assert (dear.cpu, dear.sent, dear.state_bytes) == (60, 2**20, 10)
    assert rows["none"].exposed is None
    assert rows["fsdp2"].failure == "rank 1: RuntimeError: no luck"


def printed(cell: dict[str, Any]) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    summary.show(cell, console)
    return console.export_text()


def test_cpu_taken_by_others_is_noticed(cell: dict[str, Any]) -> None:
    cell["cpus"] = 2
    assert stats.taken_by_others(cell) is None  # results from before it was recorded, or where it is unknown
    cell["strategies"] = cell["strategies"][:1]
    for block, machine in zip(cell["strategies"][0]["blocks"], (0.4, 0.6), strict=True):
        block["user_s"] = [[machine, 0.2], [machine, 0.2]]
    # 2 steps of 100 ms and 2 of 200 ms on 2 cores are 1.2 s of CPU: 1.0 were used, 0.8 of them by the two workers.
    assert stats.taken_by_others(cell) == pytest.approx(0.2 / 1.2)
    assert "Other programs took 17%" in printed(cell)
    del cell["cpus"]  # older results do not say how many the machine had, and this one's are another matter
    assert stats.taken_by_others(cell) is None and "Other programs" not in printed(cell)


def test_summary_without_ddp_floor_or_limit(cell: dict[str, Any]) -> None:
    cell["rate"], cell["strategies"] = "unlimited", cell["strategies"][4:]
    dear, failed = summary.summarise(cell)
    assert (dear.speedup, dear.exposed, dear.of_bound, dear.computed_communication) == (None,) * 4
    assert failed.failure


def test_training_table_shows_every_strategy_and_why_one_failed(cell: dict[str, Any]) -> None:
    text = printed(cell)
    assert all(one["name"] in text for one in cell["strategies"])
    assert "fsdp2 failed: rank 1: RuntimeError: no luck" in text
    assert "ddp:1 *" in text and "500 Mbit/s" in text
    # The canned losses are 5, 4 and 3 after 100 ms each: their mean is 4 after all of them.
    assert "s to loss" in text and "4.00" in text
    rows = {row.name: row.seconds_to_loss for row in summary.summarise(cell)}
    assert rows["none"] is None and rows["ddp:1"] == pytest.approx(0.3)
    cell["strategies"][2]["losses"] = [6.0, 4.5, 4.5]  # the slowest decides: 5 is the lowest that all reach
    rows = {row.name: row.seconds_to_loss for row in summary.summarise(cell)}
    assert (
        summary.target_loss(cell) == 5 and rows["ddp:25"] == pytest.approx(0.3) and rows["ddp:1"] == pytest.approx(0.1)
    )


def test_demo_table_and_pictures(cell: dict[str, Any], tmp_path: Path) -> None:
    cell["strategies"] = [cell["strategies"][index] for index in (0, 1, 4)]
    spans, lanes, now = [], [], 0
    for step in range(3):
        for phase, name in [("forward", "block 1"), ("backward", "block 1"), ("update", "update")]:
            spans.append({"step": step, "phase": phase, "name": name, "start": now, "end": now + 10**8})
            lanes.append({"lane": "all-gather", "name": "group 0", "start": now, "end": now + 10**7})
            now += 10**8
    lanes.append({"lane": "wait", "name": "block 1", "start": 45 * 10**7, "end": 55 * 10**7})  # half in backward
    trace = {"compute": spans, "lanes": lanes}
    traces, failures = {"ddp:1": trace, "dear:sharded": trace}, {"ddp:1": "rank 0: no trace"}
    result = {"tuning": cell, "training": cell, "traces": traces, "trace_failures": failures}
    demo.draw(result, tmp_path)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("loss.png", "timeline.png"))
    console = Console(width=120, record=True, file=io.StringIO())
    demo.show(result, console)
    text = console.export_text()
    assert "DeAR (sharded)" in text and "DDP (tuned, 1 MiB buckets)" in text and "500 Mbit/s" in text
    assert "No timeline of ddp:1: rank 0: no trace" in text
    assert demo.backward_ms(trace) == 50
    payload = cell["strategies"][1]["payload_bytes_per_step"]
    assert f"{payload * 8 / 500e6 * 1e3 / 50:.1f} times the backward pass, which took 50 ms here" in " ".join(
        text.split()
    )


def test_the_typical_step_is_the_one_of_median_length() -> None:
    begins = [0, 100, 400, 550, 1550, 1560]  # steps 1 to 4 take 300, 150, 1000 and 10
    spans = [{"step": step, "start": start} for step, start in enumerate(begins)]
    assert pictures.typical_step({"compute": spans}) == 2


def test_smoothing_starts_with_what_there_is() -> None:
    assert stats.trailing_mean([4.0, 2.0, 0.0]) == [4.0, 3.0, 2.0]


# Workload


def gpt(seed: int) -> nn.Module:
    return WORKLOADS["gpt"].build_seeded(seed)


def test_gpt_has_the_stated_size_and_depends_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    net = gpt(1)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(10.9e6, rel=0.01)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), gpt(1).parameters(), strict=True))
    assert not torch.equal(next(net.parameters()), next(gpt(2).parameters()))
    text = torch.zeros(2, 16, dtype=torch.long)
    assert language_loss(net(text), text).item() == pytest.approx(5.55, abs=0.5)  # ln 256


def test_text_is_the_same_every_time_and_no_window_is_read_twice() -> None:
    one = standard_library(128)
    standard_library.cache_clear()
    two = standard_library(128)
    assert one.digest == two.digest and len(one.train) > 1_000_000
    shape = {"world": 2, "batch": 4, "seed": 1}
    inputs, targets = one.batch(3, rank=1, **shape)
    assert inputs.shape == (4, 128) and torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, two.batch(3, rank=1, **shape)[0])
    assert not torch.equal(inputs, one.batch(3, rank=1, **{**shape, "seed": 2})[0])
    order = shuffled((len(one.train) - 1) // 128, 1, 0)
    assert len(order.unique()) == len(order)
    assert torch.equal(one.held_out(8)[0], two.held_out(8)[0])


def test_every_rank_and_step_of_an_epoch_reads_other_examples() -> None:
    shape = {"world": 2, "batch": 5, "seed": 3}
    epochs = [
        [places(40, step, rank=rank, **shape) for step in steps for rank in (0, 1)] for steps in [range(4), range(4, 8)]
    ]
    first, second = (torch.cat(epoch) for epoch in epochs)
    assert first.sort()[0].tolist() == second.sort()[0].tolist() == list(range(40))
    assert first.tolist() != second.tolist()


def test_text_is_cut_where_it_says() -> None:
    text = ByteText(torch.arange(101, dtype=torch.uint8), torch.arange(50, dtype=torch.uint8), 10)
    inputs, targets = text.batch(0, rank=0, world=1, batch=10, seed=3)
    assert inputs[:, 0].sort()[0].tolist() == list(range(0, 100, 10))
    assert torch.equal(targets, inputs + 1)


# Command lines


def test_strategies_are_parsed() -> None:
    found = parse_strategies("none, ddp, ddp:2.5,ddp+fp16:1,ddp+powersgd,fsdp2,dear,dear:replicated:4")
    assert [one.bucket_cap_mb for one in found] == [None, None, 2.5, 1.0, 4096.0, None, None, 4.0]
    assert isinstance(found[-1], Dear) and found[-1].update == "replicated"
    for wrong_name in ("ddp:x", "ddp:0", "ddp:-1", "dear:both", "dear:sharded:1:2", "none:1", "zero", "ddp:nan"):
        with pytest.raises(StrategyError, match="the forms are"):
            parse_strategies(f"none,{wrong_name}")
    with pytest.raises(StrategyError, match="twice"):
        parse_strategies("ddp:1,ddp:1")
    with pytest.raises(StrategyError, match="No strategy"):
        parse_strategies(" , ")
    assert "dear" in FORMS


def test_what_is_measured_of_auto_follows_the_planner() -> None:
    assert parse_strategies("auto")[0].settles == auto.MOST + auto.WARM_UP


def test_payload_counts_what_a_ring_sends() -> None:
    net = gpt(1)
    dense, half, sharded = parse_strategies("ddp:1,ddp+fp16,fsdp2+bf16")
    gradients = 4 * sum(p.numel() for p in net.parameters())
    assert dense.payload_bytes(net, 4) == gradients * 6 // 4
    assert half.payload_bytes(net, 2) == gradients // 2
    assert sharded.payload_bytes(net, 2) == gradients * 3 // 4  # parameters are gathered in float32
    assert isinstance(optimizer_factory("adamw")(net), torch.optim.AdamW)


def test_sizes() -> None:
    assert [size(text) for text in ("4096", "64K", "16m", "1G")] == [4096, 65536, 2**24, 2**30]
    assert [show_size(count) for count in (10, 2048, 2**24, 2**30)] == ["10 B", "2 KiB", "16 MiB", "1 GiB"]
    assert [show_size(2**10 * kib) for kib in (41.63, 512, 1020.4)] == ["41.6 KiB", "512 KiB", "1020 KiB"]


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        ("training", ["--strategies", "sgd"], "'sgd' is not known"),
        ("training", ["--rates", "fast"], "'fast' is not understood"),
        ("training", ["--workers", "1"], "give 2 or more"),
        ("training", ["--rounds", "0"], "at least 1"),
        ("demo", ["--optimizer", "lion"], "'lion'"),
    ],
)
def test_a_wrong_argument_gets_one_sentence(module: str, arguments: list[str], says: str) -> None:
    done = run(module, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert says in done.stderr and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_missing_package_is_told_with_the_extra_that_brings_it(tmp_path: Path) -> None:
    hide = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n: None if n == 'pandas' else f(n)"
    said = "The benchmarks need pandas: pip install dear-torch[bench]"
    imported = [sys.executable, "-c", f"{hide}\nimport benchmarks"]
    done = subprocess.run(imported, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"ImportError: {said}"
    (tmp_path / "sitecustomize.py").write_text(hide)  # started by its name it says so in one line
    started = [sys.executable, "-m", "benchmarks.demo"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stderr == f"{said}\n"


def attempts(rank: int, world_size: int) -> list[Any]:
    worker = Worker()

    def only_rank_1_fails() -> int:
        if rank == 1:
            raise ValueError("[/somewhere/in/gloo/pair.cc:42] boom\nand more")
        return rank

    return [worker.attempt(lambda: rank * 10), worker.attempt(only_rank_1_fails), worker.had_failure]


def test_ranks_agree_on_a_failure(pool2: WorkerPool) -> None:
    failure = "rank 1: ValueError: boom"
    assert pool2.run(attempts) == [[(0, None), (None, failure), True], [(10, None), (None, failure), True]]


def test_a_strategy_that_kills_its_worker_is_left_out_of_a_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def run_workers(lab: Any, measure: Any, experiment: Any, *_: Any, **__: Any) -> dict[str, Any]:
        tried.append(experiment.excluded)
        if "ddp+powersgd" not in experiment.excluded:
            raise WorkersFailed("exit code -6", "building ddp+powersgd")
        if len(tried) == 3:
            raise WorkersFailed("exit code -9", "")  # nobody to blame
        return {"done": True}

    monkeypatch.setattr(training, "run_workers", run_workers)
    experiment = Experiment(["none", "ddp+powersgd"])
    lab: Any = SimpleNamespace()
    assert training.run_cell(lab, experiment, lambda *_: None) == {"done": True}
    assert tried == [{}, {"ddp+powersgd": "took its worker down while building ddp+powersgd: exit code -6"}]
    with pytest.raises(WorkersFailed, match="while starting: exit code -9"):
        training.run_cell(lab, replace(experiment, excluded=tried[1]), lambda *_: None)


# Real runs, as small as they get


def fails_on_one(worker: Worker, experiment: dict[str, Any], report: Any) -> dict[str, Any]:
    def fail() -> None:
        if worker.rank == 1:
            raise ValueError("boom")

    return {"plan": experiment, "failure": worker.attempt(fail)[1]}


@pytest.mark.slow
def test_a_failure_is_a_result_and_costs_no_second_run() -> None:
    with open_lab(2, None, "loopback") as lab:
        found = run_workers(lab, fails_on_one, Experiment(["ddp"]), lambda *_: None, timeout=120)
    assert found["failure"] == "rank 1: ValueError: boom" and found["plan"]["strategies"] == ["ddp"]


@pytest.mark.slow
def test_training_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    done = run(
        *("training", "--strategies", "none,ddp:4,ddp+fp16", "--rounds", "1", "--warmup", "1", "--steps", "1"),
        *("--batch", "1", "--network", "loopback", "--json", str(path)),
    )
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(path.read_text())["cells"]
    assert cell["congestion_control"] == records.congestion_control()  # loopback's: of this very namespace
    floor, ddp, half = cell["strategies"]
    assert floor["failure"] is None and len(ddp["blocks"][0]["ms"]) == 2
    assert len(ddp["losses"]) == len(ddp["clock_ms"]) == 5
    assert ddp["losses"][0] == half["losses"][0] and ddp["held_out_loss"] > 0
