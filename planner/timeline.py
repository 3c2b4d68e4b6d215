"""A picture of a trace: a row for each lane, time from left to right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Span = dict[str, Any]

FIRST = ("compute", "wait", "update")


def lanes(spans: Sequence[Span]) -> list[str]:
    """Of spans (lane, name, start and end in ns), in the order of their rows: what computes first, then exchanges."""
    return sorted({span["lane"] for span in spans}, key=lambda lane: (lane not in FIRST, lane))


def busy(spans: Sequence[Span], steps: int) -> dict[str, float]:
    """Milliseconds of a step by lane."""
    total: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        total[span["lane"]] += (span["end"] - span["start"]) / 1e6 / steps
    return {lane: round(total[lane], 4) for lane in lanes(spans)}


def check_picture(path: Path) -> None:
    """Raises ValueError where matplotlib cannot draw such a file."""
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise ValueError(f"--picture must be a file that ends with one of .{', .'.join(sorted(known))}, not {path}.")


def draw(spans: Sequence[Span], path: Path) -> None:
    from matplotlib.figure import Figure

    rows = lanes(spans)
    begun = min((span["start"] for span in spans), default=0)
    figure = Figure(figsize=(10, 1 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, lane in enumerate(rows):
        bars = [
            ((span["start"] - begun) / 1e6, (span["end"] - span["start"]) / 1e6)
            for span in spans
            if span["lane"] == lane
        ]
        axes.broken_barh(bars, (row - 0.4, 0.8), color=f"C{row}", edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.grid(axis="x", alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
