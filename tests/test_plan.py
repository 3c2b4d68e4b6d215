"""Plans from canned fits: what is predicted is labelled so, and each method comes at its best fusion size."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan
from dear.cost_model import AlphaBeta, Exchange

FITS = {
    "all_reduce": {"alpha": 4e-3, "beta": 3e-9},
    "ring-rs": {"alpha": 2e-3, "beta": 1.5e-9},
    "ring-ag": {"alpha": 2e-3, "beta": 1.5e-9},
    "native-rs": {"alpha": 2e-3, "beta": 1.5e-9},
    "mpi": {"alpha": 2e-3, "beta": 1.5e-9},
}
SETTINGS = ["--forward", "100", "--backward", "200", "--size", "100M"]


def write(path: Path, fits: Any) -> str:
    cell = {"rate": "1gbit", "workers": 2, "network": "emulated network", "fits": fits}
    path.write_text(json.dumps({"cells": [cell]}))
    return str(path)


def test_ways_of_training_are_those_whose_exchanges_were_all_measured() -> None:
    half = AlphaBeta(2e-3, 1.5e-9)
    assert plan.exchanges(FITS) == {"DDP": Exchange(AlphaBeta(4e-3, 3e-9)), "DeAR, ring": Exchange(half, half)}


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan.main([write(tmp_path / "c.json", FITS), *SETTINGS])
    text = capsys.readouterr().out
    assert "PREDICTED, not measured" in text
    rows = [line.split() for line in text.splitlines() if "iB" in line]
    assert [row[0] for row in rows] == ["DeAR,", "DDP"]  # at this rate an all-reduce takes longer than backward
    assert float(rows[0][-2]) < float(rows[1][-2]) and float(rows[0][-1]) > 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.json", *SETTINGS], "holds no fits"),
        (["nowhere.json", "--forward", "-1", *SETTINGS[2:]], "Argument --forward: '-1' is not a number above 0"),
    ],
)
def test_mistakes_get_one_sentence(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main(arguments)
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1


def test_a_file_of_one_size_has_no_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main([write(tmp_path / "c.json", {}), *SETTINGS])
    assert "two sizes at least" in capsys.readouterr().err
