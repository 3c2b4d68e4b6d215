"""Tables and fits of the collectives benchmark, from canned times."""

import io
from typing import Any

import pytest
from rich.console import Console

from benchmarks.collectives import measure
from benchmarks.collectives import show as collectives_table


def account(us: float, failure: str | None = None, bad: int = 0) -> dict[str, Any]:
    block = {"us": [[us, us], [us - 1, us - 1]], "cpu_ms": [1.0, 3.0], "sent_bytes": [5, 5]}
    return {"failure": failure, "wrong": bad, "blocks": [] if failure else [block, block]}


def method(name: str, halves: int, us: float, failure: str | None = None, bad: int = 0) -> dict[str, Any]:
    return {"name": name, "halves": halves, **account(us, failure, bad)}


def compressor(name: str, us: float, encode: float, communicate: float, decode: float) -> dict[str, Any]:
    made = method(name, 2, us) | {"lossy": True, "raw_bytes": 100_000, "wire_bytes": 1000, "vnmse": 0.25}
    for block in made["blocks"]:
        parts = {"encode_us": encode, "communicate_us": communicate, "decode_us": decode}
        block |= {part: [[value] * 2] * 2 for part, value in parts.items()}
    return made


@pytest.fixture
def size() -> dict[str, Any]:
    methods = [
        method("all_reduce", 2, 1000) | {"out_of_place": account(700)},
        method("native", 2, 2000, bad=3),
        method("ring", 2, 800) | {"out_of_place": account(900, bad=2)},
        method("ring-rs", 1, 500),
        method("ring-ag", 1, 0, failure="rank 0: RuntimeError: no"),
        compressor("bf16", 750, 50, 500, 200),
        compressor("sign", 400, 100, 250, 50),
    ]
    return {"bytes": 100_000, "count": 25_000, "methods": methods}


def test_rows(size: dict[str, Any]) -> None:
    found = {row.name: row for row in collectives_table.rows(size, 4, "1gbit")}
    ring = found["ring"]
    assert [name for name, row in found.items() if row.best] == ["all_reduce", "sign"]  # the first out of place
    assert ring.speedup == pytest.approx(1.25) and ring.over("native") == pytest.approx(2.5)
    assert ring.timing.algorithm_bandwidth == pytest.approx(1.25e8)
    assert ring.timing.bus_bandwidth == pytest.approx(1.25e8 * 1.5)  # 2 (P-1)/P
    assert ring.of_rate == pytest.approx(150)  # 1.5 Gbit/s on a link of 1: canned numbers need not be possible
    assert ring.out_of_place and ring.out_of_place.p50_us == 900
    assert found["ring-rs"].timing.bus_bandwidth == pytest.approx(2e8 * 0.75) and found["ring-rs"].speedup is None
    assert found["native"].out_of_place is None and ring.cpu_ms == 2
    assert found["ring-ag"].failure and not found["ring-ag"].lossy and found["sign"].lossy


def test_compressor_rows(size: dict[str, Any]) -> None:
    bf16, sign = (row for row in collectives_table.rows(size, 4, "1gbit") if row.lossy)
    assert sign.parts_us == (100, 250, 50)
    assert sign.wire_bandwidth == pytest.approx(1000 / 250e-6)
    assert sign.speedup == pytest.approx(2.5) and sign.over("bf16") == pytest.approx(1.875)
    assert sign.best and not bf16.best


def test_tables_are_never_cut_and_say_why_a_row_failed(size: dict[str, Any]) -> None:
    experiment = {"dtype": "float", "rounds": 2, "iterations": 2}
    cell = {"rate": "1gbit", "workers": 4, "network": "emulated network", "variant": "MPICH 5", "plan": experiment}
    console = Console(width=60, record=True, file=io.StringIO())
    fits = {"ring": {"alpha": 2e-4, "beta": 8e-9}}
    collectives_table.show(cell | {"sizes": [size], "fits": fits}, console)
    text = console.export_text()
    assert "ring-ag: rank 0: RuntimeError: no" in text and "started by MPICH 5" in text
    assert "all_reduce BEST" in text and "sign BEST" in text and "…" not in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["ring"] and "900" in line)
    assert row.split() == ["ring", "900", "900", "0.111", "0.167", "2", "800", "800", "0.125", "0.188", "0", "150.0",
                           "1.250", "2.50", "2.0"]  # fmt: skip
    assert ["ring", "200.0", "8192.0", "0.125"] in [line.split() for line in text.splitlines()]


def test_results_from_before_placements_and_compressors_still_have_a_table(size: dict[str, Any]) -> None:
    for one in size["methods"]:
        one.pop("out_of_place", None)
    experiment = {"dtype": "float", "rounds": 2, "iterations": 2}
    old = {"rate": "1gbit", "workers": 4, "network": "emulated network", "plan": experiment, "sizes": [size]}
    console = Console(width=200, record=True, file=io.StringIO())
    collectives_table.show(old, console)
    assert "ring BEST" in console.export_text()


def test_fits_need_two_sizes() -> None:
    def at(bytes_: int, us: float) -> dict[str, Any]:
        return {"bytes": bytes_, "methods": [method("ring", 2, us), method("mpi", 2, 0, failure="no")]}

    assert measure.fits([at(1000, 30)]) == {}
    found = measure.fits([at(1000, 30), at(2000, 50), at(4000, 90)])
    assert set(found) == {"ring"}
    assert found["ring"]["alpha"] == pytest.approx(10e-6) and found["ring"]["beta"] == pytest.approx(20e-9)
