"""How much longer the ring takes than its bytes on the wire, of stored collectives: python -m planner.wire

That is all that another window, or another size of its pieces, could win: why ``auto`` leaves both as they are.
"""

from __future__ import annotations

import json
from pathlib import Path

from .lab import HALVES, HEADERS, rate_bytes, slowest_us
from .validation import RESULTS

METHODS = {"ring-rs": "reduce-scatter", "ring-ag": "all-gather"}


def table(results: Path = RESULTS) -> str:
    """The median over all repeats, by the size of the whole buffer, as Markdown."""
    cells = json.loads((results / HALVES).read_text())["cells"]
    sizes = [size["bytes"] for size in cells[0]["sizes"]]
    rows = [f"| beyond the wire, at {cells[0]['rate']} | {' | '.join(f'{size >> 20} MiB' for size in sizes)} |"]
    rows.append("|---" * (len(sizes) + 1) + "|")
    for cell in cells:
        workers = cell["workers"]
        for name, label in METHODS.items():
            beyond = []
            for size in cell["sizes"]:
                method = next(one for one in size["methods"] if one["name"] == name)
                wire = HEADERS * size["bytes"] * (workers - 1) / workers / rate_bytes(cell["rate"])
                beyond.append(f"{slowest_us(method) / 1e6 / wire - 1:+.1%}")
            rows.append(f"| {label}, {workers} workers | {' | '.join(beyond)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
