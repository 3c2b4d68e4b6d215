"""Turns the raw JSON of the collectives benchmark into rows and tables, in nccl-tests' form for exact methods."""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ..command import show_size
from ..network.rates import parse_rate, show_rate
from ..stats import paired_ratio, slowest_rank

BASELINE = "all_reduce"
NATIVE = "native"
REDOP = "sum"
FAILED = "[red]failed[/red]"


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
    sent: float | None = None  # bytes that left one worker's interface per run, measured
    best: bool = False  # the fastest whole all-reduce at this size, in place or out of it

    @property
    def failure(self) -> str | None:
        return self.timing.failure


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
    rivals = {one["name"]: _rounds(one) for one in exact if one["name"] in (BASELINE, NATIVE) and _finished(one)}
    made = [_row(one, rivals, size["bytes"], workers, parse_rate(rate)) for one in exact]
    times = {row.name: min(_medians(row)) for row in made if row.halves == 2 and _medians(row)}
    best = min(times, key=lambda name: times[name], default=None)
    return [Row(**{**row.__dict__, "best": row.name == best}) for row in made]


def _medians(row: Row) -> list[float]:
    return [timing.p50_us for timing in (row.timing, row.out_of_place) if timing and not timing.failure]


def _row(one: dict[str, Any], rivals: dict[str, list[float]], bytes_: int, workers: int, bits: float | None) -> Row:
    factor = one["halves"] * (workers - 1) / workers
    other = one.get("out_of_place")
    out_of_place = _timing(other, bytes_, factor) if other else None
    timing = _timing(one, bytes_, factor)
    if timing.failure:
        return Row(one["name"], one["halves"], timing, out_of_place)
    against = rivals if one["halves"] == 2 else {}  # a half compared with a whole would flatter it
    sent = [each for block in one["blocks"] for each in block["sent_bytes"] if each]
    return Row(
        name=one["name"],
        halves=one["halves"],
        timing=timing,
        out_of_place=out_of_place,
        cpu_ms=statistics.mean(cpu for block in one["blocks"] for cpu in block["cpu_ms"]),
        of_rate=100 * timing.bus_bandwidth * 8 / bits if bits else None,
        speedup=paired_ratio(_rounds(one), against[BASELINE]) if BASELINE in against else None,
        over_native=paired_ratio(_rounds(one), against[NATIVE]) if NATIVE in against else None,
        sent=statistics.median(sent) if sent else None,
    )


def _timing(account: dict[str, Any], bytes_: int, factor: float) -> Timing:
    if not _finished(account):
        return Timing(failure=account["failure"] or "no round was finished")
    p50 = np.percentile(_times(account), 50)
    bandwidth = bytes_ / (p50 / 1e6)
    return Timing(None, p50, np.percentile(_times(account), 99), bandwidth, factor * bandwidth, account["wrong"])


def compressor_rows(size: dict[str, Any]) -> list[CompressorRow]:
    """One row per compressor, failed ones included."""
    lossy = [one for one in size["methods"] if one.get("lossy")]
    finished = {one["name"]: one for one in size["methods"] if _finished(one)}
    medians = {one["name"]: np.percentile(_times(one), 50) for one in lossy if one["name"] in finished}
    best = min(medians, key=lambda name: medians[name], default=None)

    def against(one: dict[str, Any], rival: str) -> float | None:
        return paired_ratio(_rounds(one), _rounds(finished[rival])) if rival in finished else None

    made = []
    for one in lossy:
        if one["name"] not in finished:
            made.append(CompressorRow(one["name"], failure=one["failure"] or "no round was finished"))
            continue
        encode, communicate, decode = (
            statistics.median(_times(one, f"{part}_us")) for part in ("encode", "communicate", "decode")
        )
        p50 = medians[one["name"]]
        made.append(
            CompressorRow(
                name=one["name"],
                raw_bytes=one["raw_bytes"],
                wire_bytes=one["wire_bytes"],
                p50_us=p50,
                p99_us=np.percentile(_times(one), 99),
                encode_us=encode,
                communicate_us=communicate,
                decode_us=decode,
                effective_bandwidth=one["raw_bytes"] / (p50 / 1e6),
                wire_bandwidth=one["wire_bytes"] / (communicate / 1e6),
                error=one["vnmse"],
                speedup=against(one, BASELINE),
                over_16_bit=against(one, "bf16"),
                best=one["name"] == best,
            )
        )
    return made


def _finished(account: dict[str, Any]) -> bool:
    return not account["failure"] and bool(account["blocks"])


def _times(account: dict[str, Any], series: str = "us") -> list[float]:
    return [us for block in account["blocks"] for us in slowest_rank(block[series])]


def _rounds(account: dict[str, Any]) -> list[float]:
    return [statistics.median(slowest_rank(block["us"])) for block in account["blocks"]]


def show(cell: dict[str, Any], console: Console) -> None:
    """The tables of one cell, the fits, why rows failed, and how to read it all."""
    failures: dict[str, str] = {}
    if any(not one.get("lossy") for one in cell["sizes"][0]["methods"]):
        _print(_exact_table(cell, failures), console)
    if any(one.get("lossy") for one in cell["sizes"][0]["methods"]):
        _print(_compressor_table(cell, failures), console)
    for name, failure in failures.items():
        console.print(f"{name}: {failure}", style="red", highlight=False, markup=False)
    if cell.get("fits"):
        _print(_fit_table(cell), console)
    console.print(
        "Times in µs, of the slowest rank. -rs, -ag: one half of an all-reduce alone. native: the backend's own "
        "reduce_scatter + all_gather. algbw: size / time. busbw: what a link carries each way. × all_red., × native, × "
        "bf16: their time / this one's, in place, median over rounds; above 1 is faster. CPU: process time per run and "
        "worker. wrong: elements, all ranks. BEST: fastest whole all-reduce at this size. More than 100% of the rate: "
        "of messages so small that a port lets them through at once (72 KiB).",
        style="dim",
        highlight=False,
    )
    if any(one.get("lossy") for one in cell["sizes"][0]["methods"]):
        console.print(
            "Compressors: encode is what is computed before the first exchange, decode all that is computed after it. "
            "wire: bytes one rank must send. effective: raw bytes / time. error: |result - mean|² / |mean|² of one "
            "step without error feedback.",
            style="dim",
            highlight=False,
        )
    console.print()


def _title(cell: dict[str, Any]) -> str:
    plan = cell["plan"]
    started = f" · started by {cell['variant']}" if cell.get("variant") else ""
    return (
        f"{show_rate(cell['rate'])} · {cell['workers']} workers · {cell['network']}{started} · {plan['rounds']} rounds "
        f"of {plan['iterations']} runs"
    )


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    return table


def _print(table: Table, console: Console) -> None:
    """Prints it as wide as it is: a number that is cut off is worse than a line that is wrapped."""
    table.width = console.measure(table, options=console.options.update_width(1000)).maximum
    console.print(table, soft_wrap=True)


def _exact_table(cell: dict[str, Any], failures: dict[str, str]) -> Table:
    plan = cell["plan"]
    timing = ["p50", "p99", "algbw\nGB/s", "busbw\nGB/s", "#wrong"]
    placed = [f"{place}\n{column}" for place in ("out of", "in") for column in timing]
    columns = ["size", "count", "type", "redop", "method", *placed, "% of\nrate", "× all_\nred.", "×\nnative"]
    columns.append("CPU\nms")
    table = _table(f"{_title(cell)}\nout of place, in place", columns)
    for size in cell["sizes"]:
        labels = [show_size(size["bytes"]), str(size["count"]), plan["dtype"], REDOP]
        found = rows(size, cell["workers"], cell["rate"])
        for row in found:
            name = f"{row.name} [green]BEST[/green]" if row.best else row.name
            last = [
                _form(row.of_rate, ".1f"),
                _form(row.speedup, ".3f"),
                _form(row.over_native, ".2f"),
                _form(row.cpu_ms if not row.failure else None, ".1f"),
            ]
            cells = [*labels, name, *_timing_cells(row.out_of_place), *_timing_cells(row.timing), *last]
            table.add_row(*cells, end_section=row is found[-1])
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
            if row.failure:
                failures.setdefault(f"{row.name} at {show_size(size['bytes'])}", row.failure)
                table.add_row(*labels, row.name, "", "", FAILED, end_section=row is found[-1])
            else:
                table.add_row(
                    *labels,
                    f"{row.name} [green]BEST[/green]" if row.best else row.name,
                    show_size(row.raw_bytes),
                    show_size(row.wire_bytes),
                    *(f"{us:.0f}" for us in (row.p50_us, row.p99_us, row.encode_us, row.communicate_us, row.decode_us)),
                    *(f"{each / 1e9:.3f}" for each in (row.effective_bandwidth, row.wire_bandwidth)),
                    f"{row.error:.2g}",
                    _form(row.speedup, ".3f"),
                    _form(row.over_16_bit, ".3f"),
                    end_section=row is found[-1],
                )
            labels = [""] * 3
    return table


def _fit_table(cell: dict[str, Any]) -> Table:
    """What the cost model takes from this cell: fitted to measured times, unlike what it then predicts."""
    columns = ["method", "alpha us", "beta ns/KiB", "1 / beta\nGB/s"]
    table = _table("time = alpha + beta × bytes, fitted over the sizes, in place", columns)
    for name, line in cell["fits"].items():
        slope = f"{1 / line['beta'] / 1e9:.3f}" if line["beta"] else ""
        table.add_row(name, f"{line['alpha'] * 1e6:.1f}", f"{line['beta'] * 2**10 * 1e9:.1f}", slope)
    return table


def _form(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
