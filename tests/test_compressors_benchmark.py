"""The compressors benchmark: a cell per family of kernels, kept as it comes, and its table."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import reported
import torch
from rich.console import Console

from benchmarks import compressors, kernels_table
from benchmarks.kernels import FAMILIES


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *more: str) -> None:
    small = ["--numel", "4096", "--rounds", "2", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["compressors", *small, *more])
    compressors.main()


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

    monkeypatch.setattr(compressors, "FAMILIES", {"sign": FAMILIES["sign"], "dense": interrupted})
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, path)
    assert ended.value.code == 130 and "--resume goes on" in capsys.readouterr().err
    first = json.loads(path.read_text())
    assert first["benchmark"] == "compressors" and [cell["family"] for cell in first["cells"]] == ["sign"]
    monkeypatch.setattr(compressors, "FAMILIES", {"sign": interrupted, "dense": FAMILIES["dense"]})
    run(monkeypatch, path, "--resume")
    second = json.loads(path.read_text())
    assert second["cells"][0] == first["cells"][0] and second["cells"][1]["family"] == "dense"
    for kernel in (kernel for cell in second["cells"] for kernel in cell["kernels"]):
        assert len(kernel["seconds"]) == 2 and kernel["median_s"] > 0
    said = " ".join(capsys.readouterr().out.split())
    assert "cell 1 of 2: sign: resumed" in said and "cell 2 of 2: dense · 33% · round 1 of 2" in said
    assert "sign majority vote" in said and "dense members gathered" in said


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
