"""make demo: trains a GPT on the standard library's source over a slow network, by tuned DDP and by DeAR, and compares.

DDP is tuned first, over its bucket sizes. Then both train from the same weights on the same text, in turns of a few
steps so that whatever else the machine does hits both alike; each keeps its own clock. Two pictures go to out/.
"""

import argparse
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import duel, pictures, records, stats, summary
from benchmarks.command import Parser, fail, positive, rate_bits, show_rate, terminal
from benchmarks.launch import WorkersFailed, progress_bar, run_workers, worker
from benchmarks.network import NetworkError, network_choice, open_network

WORKERS = 2
RATE = "500mbit"
WORKERS_SECONDS = 1200


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.demo", description="DDP and DeAR train the same model in turns.")
    network_choice(parser)
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="adamw")
    parser.add_argument("--dear", default="dear", metavar="STRATEGY", help="such as dear:replicated:1")
    parser.add_argument("--rounds", type=positive, default=8, help="turns of each, 6 steps long")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where pictures and raw times go")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    plan = duel.DuelPlan(given.dear, given.optimizer, given.rounds)
    console = terminal()
    console.print(
        f"Training a byte-level GPT (10.9 M parameters) on Python's standard library with {WORKERS} workers, "
        "one thread each."
    )
    try:
        with open_network(given.network, WORKERS) as network:
            console.print(network.description)
            rate = network.possible([RATE])[0]
            network.set_rate(rate)
            with progress_bar(console, "demo") as report:
                result = run_workers(network.lab, "benchmarks.demo", plan, report, WORKERS_SECONDS)
    except (NetworkError, WorkersFailed) as error:
        fail(str(error))
    for part in ("tuning", "training"):
        result[part].update(rate=rate, network=network.name)
    records.write(given.out / "demo.json", {**records.header("demo", asdict(plan)), **result})
    drawn = draw(result, given.out)
    show(result, console)
    for path in drawn:
        console.print(f"Picture: {path}")
    console.print(f"Raw times: {given.out / 'demo.json'}")


def draw(result: dict[str, Any], out: Path) -> list[Path]:
    """The pictures, as far as there is something to draw; older ones are removed, lest they pass for new."""
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
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0))
    table.add_column("strategy", no_wrap=True)
    for column in ("ms/step", "exposed\ncommunication", "speed-up", "training\ntime s", "final loss", "held-out\nloss"):
        table.add_column(column, justify="right")
    for row, strategy in zip(rows, training["strategies"], strict=True):
        name = label(row.name)
        if row.failure or row.median is None:
            table.add_row(name, "[red]failed[/red]")
            continue
        alone = row.name == "none"  # its ranks train apart: its loss is that of another training
        table.add_row(
            name,
            f"{row.median:.0f}",
            "" if row.exposed is None else f"{row.exposed:.0f} ms",
            "" if alone or row.speedup is None else f"{row.speedup:.2f}×",
            f"{sum(strategy['clock_ms']) / 1e3:.1f}",
            "" if alone else f"{statistics.mean(strategy['losses'][-stats.SMOOTHED_OVER :]):.3f}",
            "" if alone or row.loss is None else f"{row.loss:.4f}",
        )
    console.print(table)
    for row in rows:
        if row.failure:
            console.print(f"{row.name} failed: {row.failure}", style="red", highlight=False)
    for name, failure in result["trace_failures"].items():
        console.print(f"No timeline of {name}: {failure}", style="red", highlight=False)
    summary.warn_of_others(summary.taken_by_others(training), console)
    tuned = [f"{row.name} {row.median:.0f} ms" for row in summary.summarise(result["tuning"]) if row.median]
    console.print(f"DDP was tuned first: {', '.join(tuned)}.", highlight=False)
    console.print(about_the_network(result), highlight=False)


def label(name: str) -> str:
    """A strategy's name for people who have not read the list of forms."""
    kind, *rest = name.split(":")
    if kind == "none":
        return "no communication (floor)"
    if kind == "ddp":
        return f"DDP (tuned, {rest[0]} MiB buckets)" if rest else "DDP"
    size = [f"{rest[1]} MiB groups"] if len(rest) > 1 else []
    return f"DeAR ({', '.join([*rest[:1], *size])})" if rest else "DeAR"


def about_the_network(result: dict[str, Any]) -> str:
    """What kind of case this network is for DeAR, with the numbers of this run."""
    training = result["training"]
    bits = rate_bits(training["rate"])
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
    return (backward["end"] - backward["start"] - pictures.overlap(backward, waits)) / 1e6


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), duel.measure)
    else:
        main()
