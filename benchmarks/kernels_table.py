"""Turns the raw JSON of the compressors benchmark into its table. Pure, so the report can use it too."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(payload: dict[str, Any], console: Console) -> None:
    """One row per kernel, beside the plain-torch way to the same end."""
    copy = payload["copy_bytes_per_s"]
    table = Table(
        title=f"Kernels · copy {copy / 1e9:.1f} GB/s · {payload.get('threads', '?')} threads",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("kernel", no_wrap=True)
    for column in ("ms", "GB/s", "% of\ncopy", "plain torch\nms", "times\nfaster", "best against\nbest"):
        table.add_column(column, justify="right")
    for kernel in payload["kernels"]:
        seconds, plain = kernel["median_s"], kernel.get("plain_median_s")
        best, plain_best = kernel.get("best_s"), kernel.get("plain_best_s")
        table.add_row(
            kernel["name"],
            f"{seconds * 1e3:.2f}",
            f"{kernel['bytes'] / seconds / 1e9:.1f}",
            f"{100 * kernel['bytes'] / seconds / copy:.0f}",
            f"{plain * 1e3:.2f}" if plain else "",
            f"{plain / seconds:.1f}" if plain else "",
            f"{plain_best / best:.1f}" if plain_best and best else "",
        )
    console.print(table)
    console.print(
        "Medians over the rounds, in which kernels, plain torch and the copy take turns. GB/s: the bytes that the "
        "kernel must move at least, by its time. % of copy: of what a copy of as many elements moves on this machine; "
        "a copy also reads the lines it overwrites, so an update in place can exceed 100.",
        style="dim",
        highlight=False,
    )
    load = payload.get("load_average")
    if load is not None and load > 1:
        console.print(
            f"Others kept {load:.1f} of the cores busy meanwhile: repeat this on a quiet machine.", style="yellow"
        )
