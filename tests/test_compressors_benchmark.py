"""The compressors benchmark: a cell per family of kernels, kept as it comes, and its table."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reported
import torch
from rich.console import Console

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import cases as case_module
from benchmarks.kernels import measure
from benchmarks.kernels import show as kernels_table
from benchmarks.kernels.case import Case
from benchmarks.kernels.cases import FAMILIES
from benchmarks.kernels.low_rank_cases import transformer_matrices
from benchmarks.records import load, provenance
from benchmarks.report import files as report
from compress import ops


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *more: str) -> None:
    small = ["--numel", "4096", "--rounds", "2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["kernels", *small, *more])
    command.main()


def only(monkeypatch: pytest.MonkeyPatch, families: dict[str, Any]) -> None:
    for module in (command, measure):
        monkeypatch.setattr(module, "FAMILIES", families)


def printed(payload: dict[str, Any]) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    kernels_table.show(payload, console)
    return console.export_text()


def test_an_interrupted_run_goes_on_with_the_next_family(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "compressors.json"

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    only(monkeypatch, {"sign": FAMILIES["sign"], "dense": interrupted})
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, path)
    assert ended.value.code == 130 and "--resume goes on" in capsys.readouterr().err
    first = json.loads(path.read_text())
    assert first["benchmark"] == "kernels" and [cell["family"] for cell in first["cells"]] == ["sign"]
    only(monkeypatch, {"sign": interrupted, "dense": FAMILIES["dense"]})
    run(monkeypatch, path, "--resume")
    second = json.loads(path.read_text())
    assert second["cells"][0] == first["cells"][0] and second["cells"][1]["family"] == "dense"
    for kernel in (kernel for cell in second["cells"] for kernel in cell["kernels"]):
        assert len(kernel["seconds"]) == 2 and kernel["median_s"] > 0 and kernel["failures"] == {}
    said = " ".join(capsys.readouterr().out.split())
    assert "cell 1 of 2: sign: resumed" in said and "cell 2 of 2: dense · 33% · round 1 of 2" in said
    assert "sign majority vote" in said and "dense members gathered" in said


def test_some_families_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "some.json"
    run(monkeypatch, path, "--families", "ACP-SGD step,dense")
    cells = json.loads(path.read_text())["cells"]
    assert [cell["family"] for cell in cells] == ["ACP-SGD step", "dense"]
    assert [kernel["name"] for kernel in cells[0]["kernels"]] == [
        f"ACP-SGD step, {way}, 1 layers of width 32, rank 4" for way in "PQ"
    ]
    with pytest.raises(SystemExit):
        run(monkeypatch, path, "--families", "none such")
    assert "'none such' is not known: choose from sign, " in capsys.readouterr().err


def test_bert_large_whole() -> None:
    called, shapes = transformer_matrices(335_544_320)
    total = sum(count * rows * columns for (rows, columns), count in shapes.items())
    assert called == "BERT-Large" and total == 24 * 12 * 1024**2 + (30522 + 512 + 1024) * 1024


def test_every_family_has_kernels_and_no_kernel_is_in_two() -> None:
    names = [case.name for family in FAMILIES.values() for case in family(torch.randn(4096), 0.01, 2)]
    assert len(set(names)) == len(names) > len(FAMILIES)


def test_the_table_of_results_with_and_without_the_common_header() -> None:
    now, before = printed(reported.compressors()), printed(reported.compressors_without_header())
    for text in (now, before):  # 12 MB in 2 ms, of a copy's 8 GB/s
        assert "sign encode 2.00 6.0 75 10.00 5.0 5.0" in " ".join(text.split()) and "copy 8.0 GB/s" in text
    # Of two processors' 2 s the machine used 1.5, and the benchmark 1.
    assert "Other programs took 25%" in " ".join(now.split())
    assert "Other programs" not in before  # those did not say how many processors there were


# What only a GPU can measure


def on_gpu() -> dict[str, Any]:
    """The canned results as if a GPU had given them."""
    payload = reported.compressors()
    payload["settings"]["device"] = "cuda"
    payload["machine"] = payload["machine"] | {"gpu": "GPU 9000"}
    payload["versions"] = payload["versions"] | {"cuda": "13.x"}
    payload["cells"][0]["input_sets"] = 13
    return payload


def test_without_a_gpu_one_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, tmp_path / "gpu.json", "--device", "cuda")
    assert ended.value.code == 1 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "error: torch sees no GPU here: leave out --device cuda.\n"


def test_kernels_built_without_cuda_are_named_as_the_cause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: Any) -> None:
        raise NotImplementedError("Could not run 'dear::error_correct' with arguments from the 'CUDA' backend.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(ops, "error_correct", missing)
    with pytest.raises(SystemExit):
        command.need_gpu()
    assert "built without CUDA" in capsys.readouterr().err


def test_the_gpu_waits_until_a_sample_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 6.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    assert measure.timed_on_gpu([partial(log.append, "a"), partial(log.append, "b")]) == pytest.approx(0.003)
    assert log == ["sleep", "record", "a", "b", "record", "synchronize"]


def test_input_sets_exceed_the_cache() -> None:
    h100, mib = 50 * 2**20, 2**20
    assert measure.sets_needed(16 * mib, h100) == 13  # 13 x 8 MiB, the smallest kernel's, are 104 MiB
    assert measure.sets_needed(64 * mib, h100) == 4
    assert measure.sets_needed(2**30, h100) == 2 and measure.sets_needed(4096, h100) == 16


def test_a_sample_calls_every_input_set_and_a_slow_way_only_one() -> None:
    log: list[str] = []

    def case(index: int, plain: str) -> Case:
        prepare = partial(log.append, f"prepare {index}")
        return Case(plain, 8, partial(log.append, f"run {index}"), partial(log.append, f"{plain} {index}"), prepare)

    def clock(calls: Any) -> float:
        before = len(log)
        for call in calls:
            call()
        return 1.0 if log[before].startswith("slow") else 0.001

    sets = [[case(index, "quick"), case(index, "slow")] for index in range(3)]
    copies = measure.measure(sets, [partial(log.append, "copy")] * 3, clock, 4, lambda *_: None)
    quick, slow = sets[0]
    assert len(copies) == 8 and len(quick.seconds) == len(quick.plain_seconds) == len(slow.seconds) == 4
    assert len(slow.plain_seconds) == 1  # besides the round that warms up, only the fourth
    sample = [f"{what} {index}" for what in ("prepare", "run", "prepare", "quick") for index in range(3)]
    assert log[:15] == ["copy"] * 3 + sample
    assert [log.count(f"slow {index}") for index in range(3)] == [2, 1, 1]
    assert not any(one.seconds for same in sets[1:] for one in same)


def test_what_cannot_run_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent() -> None:
        raise NotImplementedError("not built [here]\nat all")

    def some(*_: Any) -> list[Case]:
        return [Case("a", 8, absent, lambda: None), Case("b", 8, lambda: None, absent)]

    only(monkeypatch, {"some": some})
    run(monkeypatch, tmp_path / "some.json")
    payload = json.loads((tmp_path / "some.json").read_text())
    a, b = payload["cells"][0]["kernels"]
    assert a["median_s"] is None and a["failures"] == {"kernel": "not built [here]"} and a["plain_median_s"] > 0
    assert b["median_s"] > 0 and b["failures"] == {"plain torch": "not built [here]"} and b["plain_median_s"] is None
    said = printed(payload)
    assert "a, kernel: not built [here]" in said and "b, plain torch: not built [here]" in said
    assert said.count("failed") == 2


def test_all_that_a_kernel_is_given_is_on_the_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On "meta", which has no kernels and no numbers: a tensor left on the CPU shows."""
    seen: set[str] = set()

    def instead(name: str) -> Any:
        real = getattr(ops, name)

        def call(*given: Any) -> Any:
            seen.update(one.device.type for one in given if isinstance(one, torch.Tensor))
            return real(*given) if name.endswith("_numel") else None

        return call

    class Stub:
        def __getattr__(self, name: str) -> Any:
            return instead(name)

    monkeypatch.setattr(case_module, "ops", Stub())
    with torch.device("meta"):
        cases = [case for family in FAMILIES.values() for case in family(torch.randn(2**21), 0.01, 2)]
    for case in cases:
        case.prepare()
        case.run()
        if case.plain is not None and not case.name.startswith("top-k by threshold"):  # its size is up to the numbers
            case.plain()
    assert seen == {"meta"}


def test_tables_of_cpu_and_gpu_stand_together_and_name_their_device(tmp_path: Path) -> None:
    files = reported.write(tmp_path, cpu=reported.compressors(), gpu=on_gpu())
    cpu, gpu = map(report.printed, load(files))
    assert "Kernels on the CPU · 1048576 elements · copy 8.0 GB/s · 2 threads" in cpu
    assert "Kernels on GPU 9000 · 1048576 elements · copy 8.0 GB/s · 13 input sets" in gpu
    of_cpu, of_gpu = provenance(load(files))
    assert "GPU 9000" not in of_cpu and "4 GiB, GPU 9000; torch 2.x, cuda 13.x" in of_gpu
    assert " ms " in cpu and " 2.00 " in cpu
    assert " µs " in gpu and " 2000.00 " in gpu


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run(monkeypatch, tmp_path / "gpu.json", "--device", "cuda")
    payload = json.loads((tmp_path / "gpu.json").read_text())
    assert payload["machine"]["gpu"] == torch.cuda.get_device_name()
    assert payload["versions"]["cuda"] == torch.version.cuda and len(payload["cells"]) == len(FAMILIES)
    for cell in payload["cells"]:
        assert cell["input_sets"] == 16 and cell["copy_bytes_per_s"] > 0
        assert all(kernel["median_s"] > 0 and not kernel["failures"] for kernel in cell["kernels"])
