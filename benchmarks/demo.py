"""make demo: trains a GPT on the standard library's source over a slow network, by tuned DDP and by DeAR, and compares.

DDP is tuned first, over its bucket sizes. Then both train from the same weights on the same text, in turns of a few
steps so that whatever else the machine does hits both alike; each keeps its own clock. Two pictures go to out/.
"""

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import pictures, results, summary
from benchmarks.command import Parser, fail, positive, rate_bits, show_rate, terminal
from benchmarks.crew import Crew
from benchmarks.gpt import GPT
from benchmarks.launch import Report, WorkersFailed, progress_bar, run_workers, worker
from benchmarks.network import NetworkError, network_choice, open_network
from benchmarks.steps import TRIAL_STEPS, Measurement, Plan
from benchmarks.strategies import Trainer, is_dear
from benchmarks.timeline import STEPS, record

WORKERS = 2
RATE = "500mbit"
CANDIDATES = ["ddp:1", "ddp:2", "ddp:4", "ddp:8", "ddp:25"]
TUNING_WARMUP, TUNING_STEPS = 1, 2
TURN_WARMUP, TURN_STEPS = 1, 5
WORKERS_SECONDS = 1200


@dataclass(frozen=True)
class DemoPlan:
    """What the workers do."""

    dear: str  # the strategy that competes with the best of CANDIDATES
    optimizer: str
    rounds: int
    seed: int = 1


def measure(crew: Crew, given: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part: tune DDP, let it and DeAR and the compute floor train in turns, trace a step of DeAR."""
    demo = DemoPlan(**given)
    tuning_plan = Plan(CANDIDATES, demo.optimizer, 1, TUNING_WARMUP, TUNING_STEPS, seed=demo.seed)
    plan = Plan(["none", "ddp", demo.dear], demo.optimizer, demo.rounds, TURN_WARMUP, TURN_STEPS, seed=demo.seed)
    tuning_total = len(CANDIDATES) * (TRIAL_STEPS + TUNING_WARMUP + TUNING_STEPS)
    total = tuning_total + len(plan.strategies) * (TRIAL_STEPS + plan.rounds * (TURN_WARMUP + TURN_STEPS))

    tuning = Measurement(crew, tuning_plan, lambda done, _, doing: report(done, total, f"tuning DDP, {doing}")).run()
    best = summary.best_ddp(tuning["strategies"])
    if best is None:
        raise RuntimeError(f"No DDP bucket size could be measured: {tuning['strategies'][0]['failure']}")
    plan = replace(plan, strategies=["none", best["name"], demo.dear])
    training = Measurement(crew, plan, lambda done, _, doing: report(tuning_total + done, total, f"training, {doing}"))
    training.build()
    training.play()
    training.evaluate()  # before the trace, whose steps would give DeAR more training than DDP
    trace, why_not = crew.attempt(lambda: _trace(training))
    return {"tuning": tuning, "training": training.finish(), "trace": trace, "trace_failure": why_not}


def _trace(training: Measurement) -> dict[str, Any] | None:
    """A few more steps of DeAR under trace; None where DeAR itself failed."""
    contestant = next(one for one in training.contestants if is_dear(one.strategy))
    trainer: Trainer | None = contestant.running
    if trainer is None:
        return None
    net = trainer.model.module
    assert isinstance(net, GPT)
    return record(trainer, net, [training.next_batch(contestant)] * STEPS)


def arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.demo", description="DDP and DeAR train the same model in turns.")
    network_choice(parser)
    parser.add_argument("--optimizer", choices=["sgd", "adamw"], default="adamw")
    parser.add_argument("--dear", default="dear:sharded", metavar="STRATEGY", help="such as dear:replicated:1")
    parser.add_argument("--rounds", type=positive, default=10, help="turns of each, 6 steps long")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where pictures and raw times go")
    return parser.parse_args()


def main() -> None:
    given = arguments()
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
                result = run_workers(network.lab, "benchmarks.demo", plan_of(given), report, WORKERS_SECONDS)
    except (NetworkError, WorkersFailed) as error:
        fail(str(error))
    network_name = network.name
    for part in ("tuning", "training"):
        result[part].update(rate=rate, network=network_name)
    payload = {**results.header("demo", asdict(plan_of(given))), **result}
    results.write(given.out / "demo.json", payload)
    draw(result, given.out)
    show(result, console)
    for name in ("loss.png", "timeline.png"):
        if (given.out / name).exists():
            console.print(f"Picture: {given.out / name}")
    console.print(f"Raw times: {given.out / 'demo.json'}")


def plan_of(given: argparse.Namespace) -> DemoPlan:
    return DemoPlan(given.dear, given.optimizer, given.rounds)


def draw(result: dict[str, Any], out: Path) -> None:
    """The two pictures, as far as there is something to draw; older ones are removed, lest they pass for new."""
    training = result["training"]
    where = f"{training['workers']} workers, {training['network']}, {show_rate(training['rate'])}"
    for name in ("loss.png", "timeline.png"):
        (out / name).unlink(missing_ok=True)
    _, ddp, dear = training["strategies"]
    curves = [(label(one["name"]), one) for one in (ddp, dear) if not one["failure"]]
    if curves:
        pictures.loss_against_time(curves, f"Same model, same text, same steps\n{where}", out / "loss.png")
    if result["trace"]:
        pictures.step_timeline(
            result["trace"], f"One step of {label(dear['name'])}, rank 0 ({where})", out / "timeline.png"
        )


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
            "" if alone else f"{statistics.mean(strategy['losses'][-pictures.SMOOTHED_OVER :]):.3f}",
            "" if alone or row.loss is None else f"{row.loss:.4f}",
        )
    console.print(table)
    for row in rows:
        if row.failure:
            console.print(f"{row.name} failed: {row.failure}", style="red", highlight=False)
    if result["trace_failure"]:
        console.print(f"No timeline: {result['trace_failure']}", style="red", highlight=False)
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
    backward = backward_ms(result["trace"])
    measured = f"; it took {backward:.0f} ms here" if backward else ""
    return (
        f"At {show_rate(training['rate'])} an all-reduce takes {all_reduce:.0f} ms (computed from bytes and rate), "
        f"about twice the backward pass{measured}: this is DeAR's best case. Faster and slower networks leave less "
        "to gain."
    )


def backward_ms(trace: dict[str, Any] | None) -> float | None:
    """How long the backward pass of the traced step took."""
    if not trace:
        return None
    spans = [span for span in trace["compute"] if span["step"] == 1 and span["phase"] == "backward"]
    return sum(span["end"] - span["start"] for span in spans) / 1e6


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), measure)
    else:
        main()
