"""Turns the raw JSON of the compressors benchmark into its table. Pure, so the report can use it too."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.summary import share_of_others, warn_of_others


def show(payload: dict[str, Any], console: Console) -> None:
    """One row per kernel, beside the plain-torch way to the same end."""
    cells = payload.get("cells") or [payload]  # results from before there were cells are one cell by themselves
    table = Table(title=_title(payload, cells), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("kernel", no_wrap=True)
    for column in ("ms", "GB/s", "% of\ncopy", "plain torch\nms", "times\nfaster", "best against\nbest"):
        table.add_column(column, justify="right")
    for cell in cells:
        for kernel in cell["kernels"]:
            table.add_row(*_row(kernel, cell["copy_bytes_per_s"]))
    console.print(table)
    console.print(
        "Medians over the rounds, in which kernels, plain torch and the copy take turns. GB/s: the bytes that the "
        "kernel must move at least, by its time. % of copy: of what a copy of as many elements moves on this machine; "
        "a copy also reads the lines it overwrites, so an update in place can exceed 100.",
        style="dim",
        highlight=False,
    )
    timed = [(*cell["user_s"], cell["wall_s"], cell["cpus"]) for cell in cells if cell.get("user_s")]
    if timed:
        machine, own, wall, (cpus, *_) = zip(*timed, strict=True)
        warn_of_others(share_of_others(sum(machine), sum(own), sum(wall), cpus), console)


def _title(payload: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    copies = [f"{cell['copy_bytes_per_s'] / 1e9:.1f}" for cell in cells]
    slowest, fastest = min(copies, key=float), max(copies, key=float)
    copy = fastest if slowest == fastest else f"{slowest} to {fastest}"
    about = payload.get("settings", payload)
    elements = f"{about['numel']} elements · " if "numel" in about else ""
    return f"Kernels · {elements}copy {copy} GB/s · {about.get('threads', '?')} threads"


def _row(kernel: dict[str, Any], copy: float) -> list[str]:
    seconds, plain = kernel["median_s"], kernel.get("plain_median_s")
    best, plain_best = kernel.get("best_s"), kernel.get("plain_best_s")
    return [
        kernel["name"],
        f"{seconds * 1e3:.2f}",
        f"{kernel['bytes'] / seconds / 1e9:.1f}",
        f"{100 * kernel['bytes'] / seconds / copy:.0f}",
        f"{plain * 1e3:.2f}" if plain else "",
        f"{plain / seconds:.1f}" if plain else "",
        f"{plain_best / best:.1f}" if plain_best and best else "",
    ]
