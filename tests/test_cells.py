"""Cells are kept as they come, and a run that was cut short goes on where it stopped: only with what is the same."""

import argparse
import io
import json
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import cells, progress, records, store
from benchmarks.worker import launched


@dataclass(frozen=True)
class Experiment:
    rounds: int = 4
    excluded: dict[str, str] = field(default_factory=dict)


class Lab:
    """Stands for a benchmark: counts the cells that are measured, and is interrupted before the `broken` one."""

    def __init__(self, broken: int | None = None) -> None:
        self.measured: list[int] = []
        self.shown = 0
        self.broken = broken
        self.benchmark = cells.Benchmark("lab", lambda *_: {}, self.run_cell, self.show)

    def run_cell(self, lab: Any, experiment: Experiment, report: Any) -> dict[str, Any]:
        if len(self.measured) == self.broken:
            raise KeyboardInterrupt
        self.measured.append(experiment.rounds)
        return {"workers": 2, "plan": asdict(experiment)}

    def show(self, cell: dict[str, Any], console: Console) -> None:
        self.shown += 1


PLANS = {"seed 1": Experiment(), "seed 2": Experiment(rounds=5)}


def run(lab: Lab, monkeypatch: pytest.MonkeyPatch, experiments: dict[str, Any], *arguments: str) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["lab", "--network", "loopback", *arguments])

    parser = argparse.ArgumentParser()
    cells.options(parser)
    cells.main(lab.benchmark, parser.parse_args(), experiments)


def test_an_interrupted_run_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, first, second = tmp_path / "cells.json", Lab(broken=1), Lab()
    with pytest.raises(SystemExit) as ended:
        run(first, monkeypatch, PLANS, "--json", str(path))
    assert ended.value.code == 130 and "--resume goes on" in capsys.readouterr().err
    assert [cell["variant"] for cell in json.loads(path.read_text())["cells"]] == ["seed 1"]
    run(second, monkeypatch, PLANS, "--json", str(path), "--resume")
    assert second.measured == [5] and second.shown == 2  # what was there is shown, and not measured again
    kept = json.loads(path.read_text())["cells"]
    assert [(cell["variant"], cell["rate"], cell["network"]) for cell in kept] == [
        ("seed 1", "unlimited", "loopback"),
        ("seed 2", "unlimited", "loopback"),
    ]
    third = Lab()
    run(third, monkeypatch, PLANS, "--json", str(path))  # without --resume everything is measured anew
    assert third.measured == [4, 5] and len(json.loads(path.read_text())["cells"]) == 2


def test_what_a_second_try_left_out_is_no_other_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    run(Lab(), monkeypatch, {"": Experiment(excluded={"a": "took its worker down"})}, "--json", str(path))
    again = Lab()
    run(again, monkeypatch, {"": Experiment()}, "--json", str(path), "--resume")
    assert again.measured == [] and "variant" not in json.loads(path.read_text())["cells"][0]


def refusal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, experiments: Any, *arguments: str
) -> str:
    with pytest.raises(SystemExit) as ended:
        run(Lab(), monkeypatch, experiments, *arguments)
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_what_differs_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cells.json"
    arguments = ("--json", str(path), "--resume")
    run(Lab(), monkeypatch, {"": Experiment()}, *arguments)  # a file that is not there yet is begun
    said = refusal(capsys, monkeypatch, {"": Experiment(rounds=9)}, *arguments)
    assert "another experiment (rounds: 4 then, 9 now)" in said and len(said.splitlines()) == 1
    before = json.loads(path.read_text())
    records.write(path, before | {"commit": "feed"})
    said = refusal(capsys, monkeypatch, {"": Experiment()}, *arguments)
    assert f"another commit (feed then, {before['commit']} now)" in said
    records.write(path, before | {"machine": before["machine"] | {"cores": 1000}})
    said = refusal(capsys, monkeypatch, {"": Experiment()}, *arguments)
    assert f"another machine (cores: 1000 then, {before['machine']['cores']} now)" in said
    path.write_text("[]")
    assert "holds no results" in refusal(capsys, monkeypatch, {"": Experiment()}, *arguments)
    assert "nothing to resume" in refusal(capsys, monkeypatch, {"": Experiment()}, "--resume")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, True),
        ({"RANK": "0"}, True),  # joining the job will say what is missing
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, True),
        ({"SLURM_JOB_ID": "7"}, False),  # an allocation, in which nothing was started with srun
    ],
)
def test_who_started_us(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: bool) -> None:
    monkeypatch.setattr("os.environ", environment)
    assert launched() is expected


def test_a_difference_is_named_by_its_place() -> None:
    assert store.difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a.c: 2 then, 3 now"
    assert store.difference("x", "y") == "x then, y now"
    assert store.difference({"a": [1]}, {"a": [1]}) == ""


def test_progress_without_a_terminal_says_what_remains() -> None:
    console = Console(file=io.StringIO(), width=120)
    with progress.bar(console, "cell 1 of 1") as report:
        report(0, 4, "first")
        report(2, 4, "second")
    first, second = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert first == "cell 1 of 1 ·   0% · first"
    assert re.fullmatch(r"cell 1 of 1 ·  50% · second · about \d+ s left", second)
