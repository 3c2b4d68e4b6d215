"""Turns the raw JSON of the collectives benchmark into rows and tables, in nccl-tests' form for exact methods."""

from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean  # unlike numpy's it is exact, so the same on every machine
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from .. import tables
from ..command import show_size
from ..network.rates import parse_rate, show_rate
from ..stats import finished, paired_ratio, slowest_rank
from ..tables import note, value

BASELINE = "all_reduce"
NATIVE = "native"
REDOP = "sum"
FAILED = "[red]failed[/red]"
PARTS = ("encode", "communicate", "decode")
TIMING = ("p50", "p99", "algbw\nGB/s", "busbw\nGB/s", "#wrong")
ABOUT_COMPRESSORS = (
    " Compressors: encode is what is computed before the first exchange, decode all that is computed after it. wire: "
    "bytes one rank must send. effective: raw bytes / time. error: |result - mean|² / |mean|² of one step without "
    "error feedback."
)


@dataclass(frozen=True)
class Timing:
    """One method in one placement at one size, in place or out of it; a run is as long as its slowest rank.

    account: raw. bytes_: of the whole tensor. factor: what one link carries each way, as a multiple of these.
    """

    account: dict[str, Any]
    bytes_: int
    factor: float

    @property
    def failure(self) -> str | None:
        return None if finished(self.account) else self.account["failure"] or "no round was finished"

    def times(self, series: str = "us") -> list[float]:
        """Of all timed runs."""
        return [us for block in self.account["blocks"] for us in slowest_rank(block[series])]

    @cached_property
    def p50_us(self) -> float:
        return np.percentile(self.times(), 50)

    @property
    def p99_us(self) -> float:
        return np.percentile(self.times(), 99)

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes per second: size / p50."""
        return self.bytes_ / (self.p50_us / 1e6)

    @property
    def bus_bandwidth(self) -> float:
        """Bytes per second that one link carries each way."""
        return self.factor * self.algorithm_bandwidth


@dataclass(frozen=True)
class Row:
    """One method at one size, in place; `out_of_place` where that was measured too.

    one: its raw account. rounds: by name the median times, by round, of every method that finished at this size.
    """

    one: dict[str, Any]
    timing: Timing
    out_of_place: Timing | None
    bits: float | None  # per second, of the link
    rounds: dict[str, list[float]]
    best: bool = False  # the fastest whole all-reduce at this size, in place or out of it, or the fastest compressor

    @property
    def name(self) -> str:
        return str(self.one["name"])

    @property
    def lossy(self) -> bool:
        return bool(self.one.get("lossy"))

    @property
    def failure(self) -> str | None:
        return self.timing.failure

    @property
    def shortest(self) -> float | None:
        """µs, in place or out of it; None where neither was measured."""
        return min((one.p50_us for one in (self.timing, self.out_of_place) if one and not one.failure), default=None)

    @property
    def cpu_ms(self) -> float:
        """Process CPU time of one run, mean over ranks."""
        return fmean(cpu for block in self.one["blocks"] for cpu in block["cpu_ms"])

    @property
    def of_rate(self) -> float | None:
        """Bus bandwidth in percent of the link's rate."""
        return 100 * self.timing.bus_bandwidth * 8 / self.bits if self.bits else None

    def over(self, rival: str) -> float | None:
        """The rival's time / this one's, paired by round; None for a half of an all-reduce."""
        if self.name not in self.rounds or rival not in self.rounds or self.one["halves"] == 1:
            return None
        return paired_ratio(self.rounds[self.name], self.rounds[rival])

    @property
    def speedup(self) -> float | None:
        return self.over(BASELINE)

    @property
    def parts_us(self) -> tuple[float, float, float]:
        """Medians of a compressor's encoding, communication and decoding."""
        encode, communicate, decode = (np.median(self.timing.times(f"{part}_us")) for part in PARTS)
        return float(encode), float(communicate), float(decode)

    @property
    def wire_bandwidth(self) -> float:
        """A compressor's bytes on the wire by the time of communication, in bytes per second."""
        return self.one["wire_bytes"] / (self.parts_us[1] / 1e6)


def rows(size: dict[str, Any], workers: int, rate: str) -> list[Row]:
    """One row per method, failed ones included."""
    known = {one["name"]: _rounds(one) for one in size["methods"] if finished(one)}

    def made(one: dict[str, Any]) -> Row:
        factor = one["halves"] * (workers - 1) / workers
        out_of_place = Timing(one["out_of_place"], size["bytes"], factor) if one.get("out_of_place") else None
        return Row(one, Timing(one, size["bytes"], factor), out_of_place, parse_rate(rate), known)

    found = [made(one) for one in size["methods"]]
    best = []
    for lossy in (False, True):
        compete = [row for row in found if row.lossy == lossy and row.one["halves"] == 2 and row.shortest]
        best += sorted(compete, key=lambda row: row.shortest or 0)[:1]
    return [replace(row, best=row in best) for row in found]


def _rounds(account: dict[str, Any]) -> list[float]:
    return [float(np.median(slowest_rank(block["us"]))) for block in account["blocks"]]


def show(cell: dict[str, Any], console: Console) -> None:
    """The tables of one cell, the fits, why rows failed, and how to read it all."""
    failures: dict[str, str] = {}
    lossy = [bool(one.get("lossy")) for one in cell["sizes"][0]["methods"]]
    if not all(lossy):
        _print(_exact_table(cell, failures), console)
    if any(lossy):
        _print(_compressor_table(cell, failures), console)
    for name, failure in failures.items():
        tables.alarm(console, f"{name}: {failure}")
    if cell.get("fits"):
        _print(_fit_table(cell), console)
    note(
        console,
        "Times in µs, of the slowest rank. -rs, -ag: one half of an all-reduce alone. native: the backend's own "
        "reduce_scatter + all_gather. algbw: size / time. busbw: what a link carries each way. × all_red., × native, × "
        "bf16: their time / this one's, in place, median over rounds; above 1 is faster. CPU: process time per run and "
        "worker. wrong: elements, all ranks. BEST: fastest whole all-reduce at this size. More than 100% of the rate: "
        "of messages so small that a port lets them through at once (72 KiB)."
        + (ABOUT_COMPRESSORS if any(lossy) else ""),
    )


def _title(cell: dict[str, Any]) -> str:
    experiment = cell["plan"]
    started = f" · started by {cell['variant']}" if cell.get("variant") else ""
    where = f"{show_rate(cell['rate'])} · {cell['workers']} workers · {cell['network']}{started}"
    return f"{where} · {experiment['rounds']} rounds of {experiment['iterations']} runs"


def _table(title: str, columns: list[str]) -> Table:
    made = tables.table(title, [], columns)
    for column in made.columns:
        column.justify = "left" if column.header == "method" else "right"
    return made


def _print(table: Table, console: Console) -> None:
    """Prints it as wide as it is: a number that is cut off is worse than a line that is wrapped."""
    table.width = console.measure(table, options=console.options.update_width(1000)).maximum
    console.print(table, soft_wrap=True)


def _named(row: Row) -> str:
    return f"{row.name} [green]BEST[/green]" if row.best else row.name


def _exact_table(cell: dict[str, Any], failures: dict[str, str]) -> Table:
    placed = [f"{place}\n{column}" for place in ("out of", "in") for column in TIMING]
    last = ["% of\nrate", "× all_\nred.", "×\nnative", "CPU\nms"]
    title = f"{_title(cell)}\nout of place, in place"
    table = _table(title, ["size", "count", "type", "redop", "method", *placed, *last])
    for size in cell["sizes"]:
        labels = [show_size(size["bytes"]), str(size["count"]), cell["plan"]["dtype"], REDOP]
        found = [row for row in rows(size, cell["workers"], cell["rate"]) if not row.lossy]
        for row in found:
            numbers = [*_timing_cells(row.out_of_place), *_timing_cells(row.timing)]
            if row.failure:
                failures.setdefault(row.name, row.failure)
            else:
                forms = (row.of_rate, ".1f"), (row.speedup, ".3f"), (row.over(NATIVE), ".2f"), (row.cpu_ms, ".1f")
                numbers += [value(*form) for form in forms]
                if row.out_of_place and row.out_of_place.failure:
                    failures.setdefault(f"{row.name}, out of place", row.out_of_place.failure)
            table.add_row(*labels, _named(row), *numbers, end_section=row is found[-1])
            labels = [""] * 4
    return table


def _timing_cells(timing: Timing | None) -> list[str]:
    if timing is None:
        return ["", "", "", "", "N/A"]
    if timing.failure:
        return [FAILED, "", "", "", ""]
    wrong = timing.account["wrong"]
    bandwidths = [f"{each / 1e9:.3f}" for each in (timing.algorithm_bandwidth, timing.bus_bandwidth)]
    return [f"{timing.p50_us:.0f}", f"{timing.p99_us:.0f}", *bandwidths, f"[red]{wrong}[/red]" if wrong else "0"]


def _compressor_table(cell: dict[str, Any], failures: dict[str, str]) -> Table:
    columns = ["size", "count", "type", "method", "raw", "wire", "p50", "p99", "encode", "commu-\nnicate", "decode"]
    columns += ["effective\nGB/s", "wire\nGB/s", "relative\nerror", "× all_\nred.", "×\nbf16"]
    table = _table(f"{_title(cell)}\ncompressors, end to end", columns)
    for size in cell["sizes"]:
        labels = [show_size(size["bytes"]), str(size["count"]), cell["plan"]["dtype"]]
        found = [row for row in rows(size, cell["workers"], cell["rate"]) if row.lossy]
        for row in found:
            numbers = ["", "", FAILED]
            if row.failure:
                failures.setdefault(f"{row.name} at {show_size(size['bytes'])}", row.failure)
            else:
                us = (row.timing.p50_us, row.timing.p99_us, *row.parts_us)
                bandwidths = row.one["raw_bytes"] / (row.timing.p50_us / 1e6), row.wire_bandwidth
                numbers = [show_size(row.one[f"{bytes_}_bytes"]) for bytes_ in ("raw", "wire")]
                numbers += [*(f"{each:.0f}" for each in us), *(f"{each / 1e9:.3f}" for each in bandwidths)]
                numbers += [f"{row.one['vnmse']:.2g}", value(row.speedup, ".3f"), value(row.over("bf16"), ".3f")]
            table.add_row(*labels, _named(row), *numbers, end_section=row is found[-1])
            labels = [""] * 3
    return table


def _fit_table(cell: dict[str, Any]) -> Table:
    """What the cost model takes from this cell: fitted to measured times, unlike what it then predicts."""
    title = "time = alpha + beta × bytes, fitted over the sizes, in place"
    table = tables.table(title, "method", ["alpha us", "beta ns/KiB", "1 / beta\nGB/s"])
    for name, line in cell["fits"].items():
        slope = f"{1 / line['beta'] / 1e9:.3f}" if line["beta"] else ""
        table.add_row(name, f"{line['alpha'] * 1e6:.1f}", f"{line['beta'] * 2**10 * 1e9:.1f}", slope)
    return table
