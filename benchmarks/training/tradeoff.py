"""What compression costs and saves in a step. From raw JSON alone."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ..command import show_size
from ..network.rates import parse_rate
from ..tables import note, table, value

#: What a compressor computes in a step, as it reports it.
WORK = ("encode_ms", "merge_ms", "decode_ms")


@dataclass(frozen=True)
class Compression:
    """One compressed strategy in one cell, per step; None where it is not known."""

    name: str
    payload: int  # bytes that one rank sends
    dense: int | None  # bytes that a dense ring sends
    saved: float | None  # ms of communication less, at the link's rate: computed from the two
    spent: float | None  # ms of encoding, merging and decoding, measured

    @property
    def net(self) -> float | None:
        """ms that are saved less those that are spent."""
        return None if self.saved is None or self.spent is None else self.saved - self.spent

    @property
    def loses(self) -> bool | None:
        """Whether it computes longer than it saves."""
        return None if self.net is None else self.net < 0


def compressions(cell: dict[str, Any]) -> list[Compression]:
    """One row for each strategy with a compressor that was measured."""
    found = []
    bits = parse_rate(cell["rate"])
    for one in cell["strategies"]:
        reports, engines = (
            [report for block in one["blocks"] for report in block.get(key) or () if report]
            for key in ("compressor", "engine")
        )
        if one["failure"] or not reports:
            continue
        payload, dense = one["payload_bytes_per_step"], reports[0].get("dense_bytes")
        saved = (dense - payload) * 8 / bits * 1e3 if bits and dense is not None else None
        found.append(Compression(one["name"], payload, dense, saved, _spent(reports) or _spent(engines)))
    return found


def _spent(reports: Sequence[dict[str, Any]]) -> float | None:
    """Median of what the reports say was computed; None where none says it."""
    known = [sum(report.get(key) or 0.0 for key in WORK) for report in reports if report.get("encode_ms") is not None]
    return statistics.median(known) if known else None


def show(cell: dict[str, Any], console: Console) -> None:
    """The table of compression compute against communication saved; nothing where nothing was compressed."""
    rows = compressions(cell)
    if not rows:
        return
    columns = ("sends", "dense\nsends", "communication\nsaved ms", "compression\ncompute ms", "saved -\ncompute ms")
    made = table("Compression, per step and worker", "strategy", columns)
    for row in rows:
        net = value(row.net, ".1f")
        made.add_row(
            row.name,
            show_size(row.payload),
            value(row.dense, show_size),
            value(row.saved, ".1f"),
            value(row.spent, ".1f"),
            f"[red]{net}, loses[/red]" if row.loses else net,
        )
    console.print(made)
    note(
        console,
        "saved: computed from bytes and rate, as if nothing hid it. compute: encoding, merging and decoding, measured; "
        "some of it runs beside other work.",
    )
