"""How kernels are shown. From raw JSON alone, so the report can use it too."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ..stats import taken_meanwhile
from ..tables import alarm, note, table, value, warn_of_others

FAILED = "[red]failed[/red]"
PLAIN = "plain torch"


def show(payload: dict[str, Any], console: Console) -> None:
    """One row per kernel, beside the plain-torch way to the same end, then why rows have no numbers."""
    cells = payload.get("cells") or [payload]  # results from before there were cells are one cell by themselves
    gpu = _gpu(payload)
    unit, per_second = ("µs", 1e6) if gpu else ("ms", 1e3)
    columns = [unit, "GB/s", "% of\ncopy", f"plain torch\n{unit}", "times\nfaster", "best against\nbest"]
    shown = table(_title(payload, cells), "kernel", columns)
    kernels = [(kernel, cell["copy_bytes_per_s"]) for cell in cells for kernel in cell["kernels"]]
    for kernel, copy in kernels:
        shown.add_row(*_row(kernel, copy, per_second))
    console.print(shown)
    for kernel, _ in kernels:
        if (rival := kernel.get("rival", PLAIN)) != PLAIN:
            note(console, f"{kernel['name']}: beside it stands no plain torch, but {rival}.")
        for way, why in kernel.get("failures", {}).items():
            alarm(console, f"{kernel['name']}, {way}: {why}")
    about_gpu = (
        "GPU. Times are the GPU's own, between two events; input sets alternate, so that the L2 cache serves little "
        "of them."
    )
    about_cpu = "machine; a copy also reads the lines it overwrites, so an update in place can exceed 100."
    note(
        console,
        "Medians over the rounds, in which kernels, plain torch and the copy alternate. GB/s: the bytes that the "
        "kernel must move at least, by its time. % of copy: of what a copy of as many elements moves on this "
        + (about_gpu if gpu else about_cpu),
    )
    warn_of_others(console, taken_meanwhile(cells))


def _gpu(payload: dict[str, Any]) -> str | None:
    """The name of the GPU that was measured, None for the CPU."""
    return payload["machine"]["gpu"] if payload.get("settings", payload).get("device") == "cuda" else None


def _title(payload: dict[str, Any], cells: Sequence[dict[str, Any]]) -> str:
    copies = [f"{cell['copy_bytes_per_s'] / 1e9:.1f}" for cell in cells]
    slowest, fastest = min(copies, key=float), max(copies, key=float)
    copy = fastest if slowest == fastest else f"{slowest} to {fastest}"
    about, gpu = payload.get("settings", payload), _gpu(payload)
    elements = f"{about['numel']} elements · " if "numel" in about else ""
    by = f"{cells[0]['input_sets']} input sets" if gpu else f"{about.get('threads', '?')} threads"
    return f"Kernels on {gpu or 'the CPU'} · {elements}copy {copy} GB/s · {by}"


def _row(kernel: dict[str, Any], copy: float, per_second: float) -> list[str]:
    seconds, plain = kernel["median_s"], kernel.get("plain_median_s")
    best, plain_best = kernel.get("best_s"), kernel.get("plain_best_s")
    speed = kernel["bytes"] / seconds if seconds else None
    return [
        kernel["name"],
        f"{seconds * per_second:.2f}" if seconds else FAILED,
        value(speed, lambda each: f"{each / 1e9:.1f}"),
        value(speed, lambda each: f"{100 * each / copy:.0f}"),
        f"{plain * per_second:.2f}" if plain else FAILED if "plain torch" in kernel.get("failures", {}) else "",
        f"{plain / seconds:.1f}" if plain and seconds else "",
        f"{plain_best / best:.1f}" if plain_best and best else "",
    ]
