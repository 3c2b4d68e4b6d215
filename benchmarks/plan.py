"""Predicts, from measured collectives, which way of exchanging gradients is fastest: python -m benchmarks.plan FILE.

FILE is what `benchmarks.collectives --json` wrote. Its fits, one line of time over bytes per method, go into the cost
model together with the model's forward and backward times; everything printed is predicted, and nothing is measured.

    python -m benchmarks.plan out/collectives.json --forward 140 --backward 280 --size 42M
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from dear.cost_model import AlphaBeta, Exchange, Workload, plan

from .collectives.compressed import COMPRESSORS
from .command import Parser, fail, number, show_size, size, terminal
from .network.rates import show_rate
from .tables import note, table

# What stands for each way of training: an exchange of one piece under backward, or of two halves.
FITS = {"DDP": ["all_reduce"], "DeAR, ring": ["ring-rs", "ring-ag"], "DeAR, native": ["native-rs", "native-ag"]}
FITS |= {f"DDP + {one.name}": [one.name] for one in COMPRESSORS}
FUSION = [2**20 * megabytes for megabytes in (1, 2, 4, 8, 16, 25, 64)]


def exchanges(fits: dict[str, dict[str, float]]) -> dict[str, Exchange]:
    """The ways of training of which a cell has fits."""
    lines = {name: AlphaBeta(**line) for name, line in fits.items()}
    return {name: Exchange(*map(lines.__getitem__, of)) for name, of in FITS.items() if lines.keys() >= set(of)}


def show(cell: dict[str, Any], workload: Workload, console: Console) -> None:
    """The predictions for one cell, each method at its best fusion size, the fastest first."""
    title = f"PREDICTED, not measured · {show_rate(cell['rate'])} · {cell['workers']} workers · {cell['network']}"
    made = table(title, "method", ("fusion size", "step ms", "x compute"))
    compute = workload.forward + workload.backward
    shown = set()
    for each in plan(workload, exchanges(cell["fits"]), FUSION):  # which come fastest first
        if each.method not in shown:
            times = f"{each.seconds * 1e3:.1f}", f"{each.seconds / compute:.2f}"
            made.add_row(each.method, show_size(each.fusion_bytes), *times)
        shown.add(each.method)
    console.print(made)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(f"{__package__}.plan", __doc__)
    parser.add_argument("file", type=Path, help="what benchmarks.collectives --json wrote")
    parser.add_argument("--forward", type=number, required=True, metavar="MS", help="of one worker by itself")
    parser.add_argument("--backward", type=number, required=True, metavar="MS", help="of one worker by itself")
    parser.add_argument("--size", type=size, required=True, help="of all gradients, such as 42M")
    given = parser.parse_args(arguments)
    try:
        payload = json.loads(given.file.read_text())
        # An MPI's cell repeats the backend's all-reduce, for comparison with MPI's own.
        cells = [cell for cell in payload["cells"] if exchanges(cell["fits"]) and not cell.get("variant")]
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{given.file} holds no fits: measure with python -m benchmarks.collectives --json {given.file}")
    if not cells:
        fail(f"{given.file} holds no fits: measure two sizes at least, with -b smaller than -e")
    console = terminal()
    for cell in cells:
        show(cell, Workload(given.forward / 1e3, given.backward / 1e3, (given.size,)), console)
    note(
        console,
        "Each method at the fusion size that is predicted to be best for it. x compute: step / (forward + backward). "
        "Compressors lose something of each step, as the relative error of the measured table says.",
    )


if __name__ == "__main__":
    main()
