"""The demo's closing table, what it means, and its two pictures."""

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import stats
from ..network.rates import parse_rate, show_rate
from ..tables import alarm, failures, table, value, warn_of_others
from ..training import summary
from ..training.breakdown import covered
from . import pictures

COLUMNS = ("ms/step", "exposed\ncommunication", "speed-up", "training\ntime s", "final loss", "held-out\nloss")


def draw(result: dict[str, Any], out: Path) -> list[Path]:
    """The pictures, as far as there is something to draw; older ones are removed."""
    training = result["training"]
    where = f"{training['workers']} workers, {training['network']}, {show_rate(training['rate'])}"
    loss, timeline = out / "loss.png", out / "timeline.png"
    for path in (loss, timeline):
        path.unlink(missing_ok=True)
    curves = [(label(one["name"]), one) for one in training["strategies"][1:] if not one["failure"]]
    traces = [(label(name), trace) for name, trace in result["traces"].items()]
    if curves:
        pictures.loss_against_time(curves, f"Same model, same text, same steps\n{where}", loss)
    if traces:
        pictures.step_timeline(traces, f"One step of rank 0 ({where})", timeline)
    return [path for path in (loss, timeline) if path.exists()]


def show(result: dict[str, Any], console: Console) -> None:
    """The closing table and what it means."""
    training = result["training"]
    rows = summary.summarise(training)
    made = table(None, "strategy", COLUMNS, padding=2)
    for row, strategy in zip(rows, training["strategies"], strict=True):
        name = label(row.name)
        if row.failure or row.median is None:
            made.add_row(name, "[red]failed[/red]")
            continue
        alone = row.name == stats.FLOOR  # its ranks train apart: its loss is that of another training
        cells = (
            value(None if alone else row.speedup, lambda ratio: f"{ratio:.2f}×"),
            f"{sum(strategy['clock_ms']) / 1e3:.1f}",
            "" if alone else f"{statistics.mean(strategy['losses'][-stats.SMOOTHED_OVER :]):.3f}",
            value(None if alone else row.loss, ".4f"),
        )
        made.add_row(name, f"{row.median:.0f}", value(row.exposed, lambda ms: f"{ms:.0f} ms"), *cells)
    console.print(made)
    failures(console, rows)
    for name, failure in result["trace_failures"].items():
        alarm(console, f"No timeline of {name}: {failure}")
    warn_of_others(console, stats.taken_by_others(training))
    tuned = [f"{row.name} {row.median:.0f} ms" for row in summary.summarise(result["tuning"]) if row.median]
    console.print(f"DDP was tuned first: {', '.join(tuned)}.", highlight=False)
    console.print(about_the_network(result), highlight=False)


def label(name: str) -> str:
    """A strategy's name for people who have not read the list of forms."""
    kind, *rest = name.split(":")
    if kind == stats.FLOOR:
        return "no communication (floor)"
    if kind == "ddp":
        return f"DDP (tuned, {rest[0]} MiB buckets)" if rest else "DDP"
    size = [f"{rest[1]} MiB groups"] if len(rest) > 1 else []
    return f"DeAR ({', '.join([*rest[:1], *size])})" if rest else "DeAR"


def about_the_network(result: dict[str, Any]) -> str:
    """What kind of case this network is for DeAR, with the numbers of this run."""
    training = result["training"]
    bits = parse_rate(training["rate"])
    if bits is None:
        return "Without a rate limit DDP hides most of its communication: there is little for DeAR to gain here."
    all_reduce = training["strategies"][1]["payload_bytes_per_step"] * 8 / bits * 1e3
    backward = next((backward_ms(trace) for trace in result["traces"].values()), None)
    here = ""
    if backward:
        here = f", {all_reduce / backward:.1f} times the backward pass, which took {backward:.0f} ms here"
    return (
        f"At {show_rate(training['rate'])} an all-reduce takes {all_reduce:.0f} ms (computed from bytes and "
        f"rate){here}. DeAR gains most where that is about twice: faster and slower networks leave less to gain."
    )


def backward_ms(trace: dict[str, Any]) -> float:
    """How long the backward pass of the shown step computed, its waits left out."""
    step = pictures.typical_step(trace)
    spans = [span for span in trace["compute"] if span["step"] == step and span["phase"] == "backward"]
    backward = {"start": spans[0]["start"], "end": spans[-1]["end"]}
    waits = [span for span in trace["lanes"] if span["lane"] == "wait"]
    return (backward["end"] - backward["start"] - covered(backward, waits)) / 1e6
