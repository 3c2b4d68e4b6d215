"""Turns the raw JSON of the collectives benchmark into rows and tables, in nccl-tests' form for exact methods."""

from dataclasses import dataclass, replace
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
TIMING = ("p50", "p99", "algbw\nGB/s", "busbw\nGB/s", "#wrong")
ABOUT_COMPRESSORS = (
    " Compressors: encode is what is computed before the first exchange, decode all that is computed after it. wire: "
    "bytes one rank must send. effective: raw bytes / time. error: |result - mean|² / |mean|² of one step without "
    "error feedback."
)


@dataclass(frozen=True)
class Timing:
    """One method in one placement at one size. Bandwidths in bytes per second."""

    failure: str | None = None
    p50_us: float = 0.0  # over all timed runs, a run being as long as its slowest rank
    p99_us: float = 0.0
    algorithm_bandwidth: float = 0.0  # size / p50
    bus_bandwidth: float = 0.0  # what one link carries each way: halves * (P-1)/P of the algorithm bandwidth
    wrong: int = 0


@dataclass(frozen=True)
class Row:
    """One method at one size, in place; `out_of_place` where that was measured too. Bandwidths in bytes per second."""

    name: str
    halves: int  # 2: a whole all-reduce, 1: one half of it
    timing: Timing
    out_of_place: Timing | None = None
    cpu_ms: float = 0.0  # process CPU time of one run, mean over ranks
    of_rate: float | None = None  # bus bandwidth in percent of the link's rate
    speedup: float | None = None  # the backend's all_reduce's time / ours, paired by round
    over_native: float | None = None  # the same for the backend's own reduce_scatter + all_gather
    best: bool = False  # the fastest whole all-reduce at this size, in place or out of it

    @property
    def failure(self) -> str | None:
        return self.timing.failure

    @property
    def shortest(self) -> float | None:
        """µs, in place or out of it; None where neither was measured."""
        return min((one.p50_us for one in (self.timing, self.out_of_place) if one and not one.failure), default=None)


@dataclass(frozen=True)
class CompressorRow:
    """One compressor at one size, end to end. Times are medians of the slowest rank's, bandwidths bytes per second."""

    name: str
    failure: str | None = None
    raw_bytes: int = 0  # of the gradient
    wire_bytes: int = 0  # what one rank must send
    p50_us: float = 0.0
    p99_us: float = 0.0
    encode_us: float = 0.0
    communicate_us: float = 0.0
    decode_us: float = 0.0
    effective_bandwidth: float = 0.0  # raw bytes / p50
    wire_bandwidth: float = 0.0  # wire bytes / communicate
    error: float = 0.0  # |result - mean|² / |mean|² of one step without error feedback
    speedup: float | None = None  # the backend's all_reduce's time / ours, paired by round
    over_16_bit: float | None = None  # the same for dense in 16 bits
    best: bool = False  # the fastest compressor at this size


def rows(size: dict[str, Any], workers: int, rate: str) -> list[Row]:
    """One row per exact method, failed ones included."""
    exact = [one for one in size["methods"] if not one.get("lossy")]
    rivals = {one["name"]: _rounds(one) for one in exact if one["name"] in (BASELINE, NATIVE) and finished(one)}
    made = [_row(one, rivals, size["bytes"], workers, parse_rate(rate)) for one in exact]
    best = min(
        (row for row in made if row.halves == 2 and row.shortest), key=lambda row: row.shortest or 0, default=None
    )
    return [replace(row, best=row is best) for row in made]


def _row(one: dict[str, Any], rivals: dict[str, list[float]], bytes_: int, workers: int, bits: float | None) -> Row:
    factor = one["halves"] * (workers - 1) / workers
    out_of_place = _timing(one["out_of_place"], bytes_, factor) if one.get("out_of_place") else None
    timing = _timing(one, bytes_, factor)
    if timing.failure:
        return Row(one["name"], one["halves"], timing, out_of_place)
    against = rivals if one["halves"] == 2 else {}  # a half compared with a whole would flatter it
    return Row(
        name=one["name"],
        halves=one["halves"],
        timing=timing,
        out_of_place=out_of_place,
        cpu_ms=fmean(cpu for block in one["blocks"] for cpu in block["cpu_ms"]),
        of_rate=100 * timing.bus_bandwidth * 8 / bits if bits else None,
        speedup=paired_ratio(_rounds(one), against[BASELINE]) if BASELINE in against else None,
        over_native=paired_ratio(_rounds(one), against[NATIVE]) if NATIVE in against else None,
    )


def _timing(account: dict[str, Any], bytes_: int, factor: float) -> Timing:
    if not finished(account):
        return Timing(failure=account["failure"] or "no round was finished")
    p50, p99 = np.percentile(_times(account), [50, 99])
    bandwidth = bytes_ / (p50 / 1e6)
    return Timing(None, p50, p99, bandwidth, factor * bandwidth, account["wrong"])


def compressor_rows(size: dict[str, Any]) -> list[CompressorRow]:
    """One row per compressor, failed ones included."""
    known = {one["name"]: _rounds(one) for one in size["methods"] if finished(one)}
    made = [_compressor_row(one, known) for one in size["methods"] if one.get("lossy")]
    best = min((row for row in made if not row.failure), key=lambda row: row.p50_us, default=None)
    return [replace(row, best=row is best) for row in made]


def _compressor_row(one: dict[str, Any], known: dict[str, list[float]]) -> CompressorRow:
    if one["name"] not in known:
        return CompressorRow(one["name"], failure=one["failure"] or "no round was finished")
    p50, p99 = np.percentile(_times(one), [50, 99])
    encode, communicate, decode = (np.median(_times(one, f"{part}_us")) for part in ("encode", "communicate", "decode"))
    speedup, over_16_bit = (
        paired_ratio(known[one["name"]], known[rival]) if rival in known else None for rival in (BASELINE, "bf16")
    )
    return CompressorRow(
        one["name"],
        None,
        one["raw_bytes"],
        one["wire_bytes"],
        p50,
        p99,
        float(encode),
        float(communicate),
        float(decode),
        effective_bandwidth=one["raw_bytes"] / (p50 / 1e6),
        wire_bandwidth=one["wire_bytes"] / (float(communicate) / 1e6),
        error=one["vnmse"],
        speedup=speedup,
        over_16_bit=over_16_bit,
    )


def _times(account: dict[str, Any], series: str = "us") -> list[float]:
    return [us for block in account["blocks"] for us in slowest_rank(block[series])]


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
    plan = cell["plan"]
    started = f" · started by {cell['variant']}" if cell.get("variant") else ""
    where = f"{show_rate(cell['rate'])} · {cell['workers']} workers · {cell['network']}{started}"
    return f"{where} · {plan['rounds']} rounds of {plan['iterations']} runs"


def _table(title: str, columns: list[str]) -> Table:
    made = tables.table(title, [], columns)
    for column in made.columns:
        column.justify = "left" if column.header == "method" else "right"
    return made


def _print(table: Table, console: Console) -> None:
    """Prints it as wide as it is: a number that is cut off is worse than a line that is wrapped."""
    table.width = console.measure(table, options=console.options.update_width(1000)).maximum
    console.print(table, soft_wrap=True)


def _named(row: Row | CompressorRow) -> str:
    return f"{row.name} [green]BEST[/green]" if row.best else row.name


def _exact_table(cell: dict[str, Any], failures: dict[str, str]) -> Table:
    placed = [
        f"{place}\n{column}"
        for place in ("out of", "in")
        for column in ("p50", "p99", "algbw\nGB/s", "busbw\nGB/s", "#wrong")
    ]
    last = ["% of\nrate", "× all_\nred.", "×\nnative", "CPU\nms"]
    table = _table(
        f"{_title(cell)}\nout of place, in place", ["size", "count", "type", "redop", "method", *placed, *last]
    )
    for size in cell["sizes"]:
        labels = [show_size(size["bytes"]), str(size["count"]), cell["plan"]["dtype"], REDOP]
        found = rows(size, cell["workers"], cell["rate"])
        for row in found:
            forms = (row.of_rate, ".1f"), (row.speedup, ".3f"), (row.over_native, ".2f"), (row.cpu_ms or None, ".1f")
            numbers = [*_timing_cells(row.out_of_place), *_timing_cells(row.timing), *(value(*form) for form in forms)]
            table.add_row(*labels, _named(row), *numbers, end_section=row is found[-1])
            labels = [""] * 4
            if row.failure:
                failures.setdefault(row.name, row.failure)
            elif row.out_of_place and row.out_of_place.failure:
                failures.setdefault(f"{row.name}, out of place", row.out_of_place.failure)
    return table


def _timing_cells(timing: Timing | None) -> list[str]:
    if timing is None:
        return ["", "", "", "", "N/A"]
    if timing.failure:
        return [FAILED, "", "", "", ""]
    wrong = f"[red]{timing.wrong}[/red]" if timing.wrong else "0"
    bandwidths = [f"{each / 1e9:.3f}" for each in (timing.algorithm_bandwidth, timing.bus_bandwidth)]
    return [f"{timing.p50_us:.0f}", f"{timing.p99_us:.0f}", *bandwidths, wrong]


def _compressor_table(cell: dict[str, Any], failures: dict[str, str]) -> Table:
    columns = ["size", "count", "type", "method", "raw", "wire", "p50", "p99", "encode", "commu-\nnicate", "decode"]
    columns += ["effective\nGB/s", "wire\nGB/s", "relative\nerror", "× all_\nred.", "×\nbf16"]
    table = _table(f"{_title(cell)}\ncompressors, end to end", columns)
    for size in cell["sizes"]:
        labels = [show_size(size["bytes"]), str(size["count"]), cell["plan"]["dtype"]]
        found = compressor_rows(size)
        for row in found:
            numbers = ["", "", FAILED]
            if row.failure:
                failures.setdefault(f"{row.name} at {show_size(size['bytes'])}", row.failure)
            else:
                us = (row.p50_us, row.p99_us, row.encode_us, row.communicate_us, row.decode_us)
                numbers = [show_size(row.raw_bytes), show_size(row.wire_bytes), *(f"{each:.0f}" for each in us)]
                numbers += [f"{each / 1e9:.3f}" for each in (row.effective_bandwidth, row.wire_bandwidth)]
                numbers += [f"{row.error:.2g}", value(row.speedup, ".3f"), value(row.over_16_bit, ".3f")]
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
