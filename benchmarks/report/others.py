"""Tables of losses, collectives, kernels, bandwidth, memory, repeats and sources, for the results pages."""

from collections.abc import Iterable, Sequence
from typing import Any

from .. import losses
from ..collectives import show as collectives
from ..command import show_size
from ..kernels.show import PLAIN
from ..memory import show as memory
from ..network.rates import bits, show_rate
from ..records import Source
from ..tables import value
from ..training import seeds
from . import repeats
from .evidence import Evidence
from .markdown import extent, number, table

MPIS = ("Open MPI", "MPICH")
# The columns of ways_table, by the name of the method, or of the MPI.
WAYS = {"all_reduce": "gloo's all-reduce", "ring": "ring", **{title: title for title in MPIS}, "bf16": "bf16"}
WAYS |= {"acp:4": "ACP-SGD, rank 4", "power:4": "Power-SGD, rank 4", "topk:0.01": "Top-k 1%", "sign": "EF-SignSGD"}


def loss_table(sources: Iterable[Source]) -> str:
    """Held-out loss against dense, every run of every strategy."""
    rows = []
    for source in sources:
        experiment = source.cells[0]["plan"]
        for row in losses.rows(source.cells):
            if row.ratio is None or row.worst is None or row.held_out is None:
                continue
            about = f"{experiment.get('workload', 'gpt')}, {experiment['optimizer']}, {experiment['steps']} steps"
            mark = "**" if row.ratio > losses.TOLERANCE else ""
            ratios = [f"{mark}{row.ratio:.3f}×{mark}", f"{row.worst:.3f}×"]
            rows.append([row.name, source.file, about, str(row.seeds), f"{row.held_out:.3f}", *ratios])
    rows.sort(key=lambda row: (row[2], row[0], row[1]))
    return table(["strategy", "run", "training", "seeds", "held-out loss", "to dense", "worst seed"], rows)


def seed_table(source: Source) -> str:
    """One row for each strategy and rate: step, time to the loss that all reach, and loss, means over the seeds."""
    rows = []
    found = seeds.groups(source.cells)
    for group in found:
        for row in seeds.rows(group):
            numbers = (row.step, ".0f"), (row.speedup, ".2f"), (row.seconds_to_loss, ".1f"), (row.held_out_ratio, ".2f")
            shown = [format(one, form) if one else "" for one, form in numbers]
            rows.append([f"{show_rate(group[0]['rate'])}, {row.name}", *shown])
    to_loss = f"seconds to a training loss of {extent(map(seeds.target_loss, found), '.2f')}"
    return table(["link, strategy", "ms per step", "× best DDP", to_loss, "held-out loss, to DDP's"], rows)


def bandwidth_table(sources: Iterable[Source]) -> str:
    """The lowest rate at which a strategy holds, and the highest at which it does not."""
    rows = []
    for source in sources:
        for one in source.payload.get("needed", []):
            ratios = dict(one["measured"])
            ends = [f"{show_rate(rate)} ({ratios[rate]:.2f}×)" if rate else "" for rate in (one["holds"], one["fails"])]
            rows.append([one["strategy"], str(one["workers"]), ends[0] or "none of these", ends[1]])
    return table(["strategy", "workers", "holds at", "not at"], rows)


def _rows(cell: dict[str, Any], bytes_: int = 0) -> list[tuple[int, dict[str, collectives.Row]]]:
    """For each size, or that one, the methods that finished, by name."""
    return [
        (size["bytes"], {row.name: row for row in found if not row.failure})
        for size in cell["sizes"]
        if bytes_ in (0, size["bytes"]) and (found := collectives.rows(size, cell["workers"], cell["rate"]))
    ]


def _plain(sources: Iterable[Source]) -> list[tuple[Source, dict[str, Any]]]:
    """The cells that no MPI started, by workers, rate and date."""
    found = [(source, cell) for source in sources for cell in source.cells if not cell.get("variant")]
    return sorted(found, key=lambda one: (one[1]["workers"], bits(one[1]["rate"]), one[0].when))


def _where(cell: dict[str, Any]) -> str:
    return f"{cell['workers']} workers, {show_rate(cell['rate'])}"


def ring_table(sources: Sequence[Source], rival: str = "all_reduce") -> str:
    """The ring against the backend's all_reduce or its own two halves, by size: the ratio of times, and CPU ms."""
    cells = _plain(sources)
    sizes = sorted({size["bytes"] for _, cell in cells for size in cell["sizes"]})
    rows = []
    for source, cell in cells:
        found = dict(_rows(cell))
        shown = [_ring(found[size], rival) if size in found else "" for size in sizes]
        rows.append([_where(cell), source.file, *shown])
    return table(["link", "run", *map(show_size, sizes)], rows)


def _ring(found: dict[str, collectives.Row], rival: str) -> str:
    ring, other = found.get("ring"), found.get(rival)
    gain = ring and (ring.speedup if rival == collectives.BASELINE else ring.over(collectives.NATIVE))
    return f"{gain:.2f}× ({number(ring.cpu_ms)}, {number(other.cpu_ms)})" if ring and other and gain else ""


def of_link(sources: Sequence[Source], at_least: int) -> str:
    """How much of the link each half of the ring fills, from that size on, over all rates that limit it."""
    found = [
        row.of_rate
        for _, cell in _plain(sources)
        for size, rows in _rows(cell)
        for name, row in rows.items()
        if size >= at_least and name in ("ring-rs", "ring-ag") and row.of_rate
    ]
    return extent(found, ".1f", "%")


def ways_table(sources: Sequence[Source], bytes_: int = 2**22) -> str:
    """All ways side by side at one size, in place: ms of the slowest rank, medians."""
    rows = []
    for source, cell in _plain(sources):
        for size, found in _rows(cell, bytes_):
            us = {name: row.timing.p50_us for name, row in found.items()} | _mpi(source, cell, size)
            shown = [number(us[name] / 1e3) if name in us else "" for name in WAYS]
            rows.append([_where(cell), source.file, *shown])
    return table(["link", "run", *WAYS.values()], rows)


def _mpi(source: Source, plain: dict[str, Any], bytes_: int) -> dict[str, float]:
    """MPI's all-reduce in µs, by the MPI, at the workers and rate of a cell that no MPI started."""
    return {
        title: rows["mpi"].timing.p50_us
        for cell in source.cells
        for title in MPIS
        if cell.get("variant", "").startswith(title) and _where(cell) == _where(plain)
        for _, rows in _rows(cell, bytes_)
        if "mpi" in rows
    }


def kernel_table(sources: Sequence[Source]) -> str:
    """Share of the copy bandwidth, and how many times as fast as plain torch, of every kernel in each of the files."""
    found: dict[str, list[str]] = {}
    for place, source in enumerate(sources):
        for cell in source.cells or [source.payload]:
            for kernel in cell["kernels"]:
                rival = kernel.get("rival", PLAIN)
                name = kernel["name"] if rival == PLAIN else f"{kernel['name']} (beside {rival})"
                row = found.setdefault(name, [""] * 2 * len(sources))
                if kernel["median_s"]:
                    row[2 * place] = f"{100 * kernel['bytes'] / kernel['median_s'] / cell['copy_bytes_per_s']:.0f}%"
                    if kernel.get("plain_median_s"):
                        medians, bests = (kernel[f"plain_{one}_s"] / kernel[f"{one}_s"] for one in ("median", "best"))
                        row[2 * place + 1] = f"{medians:.1f}× ({bests:.1f}×)"
    head = [words for source in sources for words in (f"{source.file}: % of copy", "times plain torch")]
    return table(["kernel", *head], [[name, *row] for name, row in found.items()])


def copy_bandwidth(source: Source) -> str:
    """GB/s of a copy, over the families."""
    return extent((cell["copy_bytes_per_s"] / 1e9 for cell in source.cells or [source.payload]), ".0f", " GB/s")


def memory_table(sources: Iterable[Source]) -> str:
    """One row for each strategy that was measured: bytes per byte of parameters."""
    rows = [
        [f"`{memory.name_of(cell)}`", *(value(memory.per_byte(cell, column), ".2f") for column in memory.COLUMNS)]
        for source in sources
        for cell in source.cells
        if not cell["failure"]
    ]
    return table(["strategy", *memory.COLUMNS.values()], rows)


def repeat_table(evidence: Evidence) -> str:
    """Pairs of runs of one table: how far their ratios to the baseline are apart."""
    rows = []
    for one in repeats.of(evidence):
        off = [f"{percent:.1f}%" for percent in one.off_by]
        rows.append([one.what, one.first.file, one.second.file, str(len(one.rows)), *off])
    return table(["table", "first run", "second run", "rows", "median difference", "largest"], rows)


def source_table(sources: Iterable[Source]) -> str:
    rows = [[one.file, one.when[:10], one.commit, one.machine, one.versions, f"`{one.command}`"] for one in sources]
    return table(["file", "measured", "commit", "machine", "versions", "command"], rows)
