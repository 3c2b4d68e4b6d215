"""How much longer the ring takes than its bytes on the wire, of stored collectives: python -m benchmarks.predicted.wire

That is all that another window, or another size of its pieces, could win: why ``auto`` leaves both as they are.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..command import show_size
from ..network.rates import show_rate
from ..records import RESULTS
from ..report import markdown
from .lab import HALVES, slowest_us, wire_seconds

METHODS = {"ring-rs": "reduce-scatter", "ring-ag": "all-gather"}


def table(results: Path = RESULTS) -> str:
    """The median over all repeats, by the size of the whole buffer, as Markdown."""
    cells = json.loads((results / HALVES).read_text())["cells"]
    sizes = [show_size(size["bytes"]) for size in cells[0]["sizes"]]
    rows = []
    for cell in cells:
        workers = cell["workers"]
        for name, label in METHODS.items():
            beyond = []
            for size in cell["sizes"]:
                method = next(one for one in size["methods"] if one["name"] == name)
                wire = wire_seconds(size["bytes"], workers, cell["rate"])
                beyond.append(f"{slowest_us(method) / 1e6 / wire - 1:+.1%}")
            rows.append([f"{label}, {workers} workers", *beyond])
    return markdown.table([f"beyond the wire, at {show_rate(cells[0]['rate'])}", *sizes], rows)


if __name__ == "__main__":
    print(table())
