"""Turns the raw JSON of the collectives benchmark into rows and a table in nccl-tests' form."""

import statistics
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.command import rate_bits, show_rate, show_size
from benchmarks.results import paired_ratio, percentile, slowest_rank

BASELINE = "all_reduce"
NATIVE = "native"


@dataclass(frozen=True)
class Row:
    """One method at one size. Bandwidths in bytes per second."""

    name: str
    halves: int  # 2: a whole all-reduce, 1: one half of it
    failure: str | None = None
    p50_us: float = 0.0  # over all timed runs, a run being as long as its slowest rank
    p99_us: float = 0.0
    cpu_ms: float = 0.0  # process CPU time of one run, mean over ranks
    algorithm_bandwidth: float = 0.0  # size / p50
    bus_bandwidth: float = 0.0  # what one link carries each way: halves * (P-1)/P of the algorithm bandwidth
    of_rate: float | None = None  # bus bandwidth in percent of the link's rate
    speedup: float | None = None  # the backend's all_reduce's time / ours, paired by round
    over_native: float | None = None  # the same for the backend's own reduce_scatter + all_gather
    sent: float | None = None  # bytes that left one worker's interface per run, measured
    wrong: int = 0
    best: bool = False  # the fastest whole all-reduce at this size


def rows(size: dict[str, Any], workers: int, rate: str) -> list[Row]:
    """One row per method, failed ones included."""
    finished = [one for one in size["methods"] if not one["failure"] and one["blocks"]]
    medians = {one["name"]: percentile(_times(one), 50) for one in finished}
    whole = [one["name"] for one in finished if one["halves"] == 2]
    best = min(whole, key=lambda name: medians[name], default=None)
    rivals = {one["name"]: _rounds(one) for one in finished if one["name"] in (BASELINE, NATIVE)}
    bits = rate_bits(rate)
    made = []
    for one in size["methods"]:
        if one["name"] not in medians:
            made.append(Row(one["name"], one["halves"], failure=one["failure"] or "no round was finished"))
            continue
        p50 = medians[one["name"]]
        bandwidth = size["bytes"] / (p50 / 1e6)
        bus = one["halves"] * (workers - 1) / workers * bandwidth
        against = rivals if one["halves"] == 2 else {}  # a half compared with a whole would flatter it
        sent = [each for block in one["blocks"] for each in block["sent_bytes"] if each]
        made.append(
            Row(
                name=one["name"],
                halves=one["halves"],
                p50_us=p50,
                p99_us=percentile(_times(one), 99),
                cpu_ms=statistics.mean(cpu for block in one["blocks"] for cpu in block["cpu_ms"]),
                algorithm_bandwidth=bandwidth,
                bus_bandwidth=bus,
                of_rate=100 * bus * 8 / bits if bits else None,
                speedup=paired_ratio(_rounds(one), against[BASELINE]) if BASELINE in against else None,
                over_native=paired_ratio(_rounds(one), against[NATIVE]) if NATIVE in against else None,
                sent=statistics.median(sent) if sent else None,
                wrong=one["wrong"],
                best=one["name"] == best,
            )
        )
    return made


def _times(method: dict[str, Any]) -> list[float]:
    return [us for block in method["blocks"] for us in slowest_rank(block["us"])]


def _rounds(method: dict[str, Any]) -> list[float]:
    return [statistics.median(slowest_rank(block["us"])) for block in method["blocks"]]


def show(cell: dict[str, Any], console: Console) -> None:
    """The table of one cell, then why rows failed, then how to read it."""
    plan = cell["plan"]
    shown = Table(
        title=f"{show_rate(cell['rate'])} · {cell['workers']} workers · {cell['network']} · {plan['rounds']} rounds of "
        f"{plan['iterations']} runs",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("size", "count", "type", "method"):
        shown.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for name in (
        "time us\np50",
        "time us\np99",
        "algbw\nGB/s",
        "busbw\nGB/s",
        "% of\nrate",
        "× all_\nreduce",
        "×\nnative",
        "CPU ms",
    ):
        shown.add_column(name, justify="right")
    shown.add_column("wrong", justify="right")
    failures: dict[str, str] = {}
    for size in cell["sizes"]:
        labels = [show_size(size["bytes"]), str(size["count"]), plan["dtype"]]
        for row in rows(size, cell["workers"], cell["rate"]):
            shown.add_row(*labels, *_cells(row), end_section=row.name == plan["methods"][-1])
            labels = ["", "", ""]
            if row.failure:
                failures[row.name] = row.failure
    console.print(shown)
    for name, failure in failures.items():
        console.print(f"{name} failed: {failure}", style="red", highlight=False)
    console.print(
        "native: the backend's own reduce_scatter + all_gather. -rs, -ag: one half alone. time: the slowest rank's. "
        "busbw: what a link carries each way. × all_reduce, × native: their time / this one's, median over rounds; "
        "above 1 is faster. CPU: process time per run and worker. wrong: elements, all ranks. BEST: fastest whole "
        "all-reduce at its size.\n",
        style="dim",
        highlight=False,
    )


def _cells(row: Row) -> list[str]:
    if row.failure:
        return [row.name, "[red]failed[/red]"]
    return [
        f"{row.name} [green]BEST[/green]" if row.best else row.name,
        f"{row.p50_us:.0f}",
        f"{row.p99_us:.0f}",
        f"{row.algorithm_bandwidth / 1e9:.3f}",
        f"{row.bus_bandwidth / 1e9:.3f}",
        "" if row.of_rate is None else f"{row.of_rate:.1f}",
        "" if row.speedup is None else f"{row.speedup:.3f}",
        "" if row.over_native is None else f"{row.over_native:.2f}",
        f"{row.cpu_ms:.1f}",
        f"[red]{row.wrong}[/red]" if row.wrong else "0",
    ]
