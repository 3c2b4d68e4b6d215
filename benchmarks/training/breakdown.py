"""Breaks a training step down: by phase, by module, by communication operator.

A profiled run of its own after the timed rounds, so that neither hooks nor profiler are in the times that are compared.
What a strategy does not report is an empty cell.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .timeline import record
from .trainer import Trainer

STEPS = 6  # profiled; the first and the last are left out: one fills the pipeline, the other's gather has no forward
#: A shorter pause of the training thread is the interpreter between two operators, and no wait.
SHORTEST_WAIT_NS = 200_000
#: What backends call their operators in a profile.
OPERATORS = ("gloo:", "nccl:", "mpi:", "ucc:")
#: What computes. Other events, such as an autograd node of Python, last as long as what they wait for.
COMPUTES = ("aten::", "fsdp::", "torch::distributed::reducer", "torch.distributed.ddp.reducer")
PHASES = (
    "forward", "backward", "optimizer", "scheduler", "encode", "merge", "decode",
    "exposed_reduce_scatter", "exposed_all_gather", "exposed_other",
)  # fmt: skip
#: What engines and compressors say of a step themselves, and the phase that it is.
REPORTED = {"encode_ms": "encode", "merge_ms": "merge", "decode_ms": "decode"}

Span = dict[str, Any]


class ProfilerTrace:
    """The collectives of torch's own strategies, from torch's profiler: same calls as an engine's trace.

    A collective moves from when the backend starts it until it is done. "wait" spans are where one moves and no
    operator runs: exposed communication.
    """

    def start_trace(self) -> None:
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profiler.start()
        self._clock = time.perf_counter_ns()
        with torch.profiler.record_function("@clock"):
            pass

    def stop_trace(self) -> list[Span]:
        self._profiler.stop()
        results = self._profiler.profiler
        assert results is not None and results.kineto_results is not None
        events = [(event.name(), event.start_ns(), event.duration_ns()) for event in results.kineto_results.events()]
        shift = self._clock - next(start for name, start, _ in events if name == "@clock")
        moves: list[Span] = []
        computes: list[Span] = []
        for name, start, length in events:
            span: Span = {"name": name, "start": start + shift, "end": start + shift + length}
            if name.startswith(OPERATORS):
                operator = name.split(":", 1)[1].strip("_").replace("_", "-")
                moves.append({**span, "lane": "communication", "name": operator})
            elif name.startswith(COMPUTES):
                computes.append(span)
        return moves + exposed(moves, computes)


def exposed(moves: Sequence[Span], computes: Sequence[Span]) -> list[Span]:
    """Where something moves and nothing computes, as "wait" spans named after what moves, the earliest begun first."""
    busy = _union(computes)
    waits: list[Span] = []
    reached = 0
    for move in sorted(moves, key=lambda span: span["start"]):
        start = max(move["start"], reached)
        for begin, end in [*((b, e) for b, e in busy if e > start and b < move["end"]), (move["end"], move["end"])]:
            if begin - start >= SHORTEST_WAIT_NS:
                waits.append({"lane": "wait", "name": move["name"], "start": start, "end": begin})
            start = max(start, end)
        reached = max(reached, move["end"])
    return waits


def _union(spans: Iterable[Span]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for span in sorted(spans, key=lambda span: span["start"]):
        if merged and span["start"] <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], span["end"])
        else:
            merged.append((span["start"], span["end"]))
    return merged


def profile(
    trainer: Trainer, parts: Iterable[tuple[str, nn.Module]], batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """Trains a step per batch under trace, while all ranks do; the account of this rank."""
    if batches[0][0].is_cuda:
        raise RuntimeError("The breakdown reads clocks of the host, so it is for CPU tensors: leave --breakdown out.")
    reports: list[dict[str, Any]] = []
    plain_hook = trainer.engine is None and trainer.compressor is not None  # which nothing can see into
    tracer = None if plain_hook else ProfilerTrace() if trainer.engine is None else trainer.engine
    stats = trainer.compressor_stats if plain_hook else trainer.stats
    recorded = record(trainer, parts, batches, tracer, lambda: reports.append(stats()))
    return account(recorded["compute"], recorded["lanes"], reports[1:-1])


def account(compute: Sequence[Span], lanes: Sequence[Span] | None, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Milliseconds per step, over all steps but the first and the last.

    compute, lanes: as of timeline.record; lanes is None where nobody saw what moved, and waits are then inside the
    phase in which they fell, unless the reports say how long they were. reports: what the strategy says of its steps.

    Returns "phases": time of the training thread by what it did (PHASES), None where unknown; "encode", "merge"
    (between exchanges) and "decode" may run beside the others. "modules": by part. "operators": by what moved, None
    where unknown.
    """
    steps = sorted({span["step"] for span in compute})[1:-1]
    waits = [span for span in lanes or () if span["lane"] == "wait"]
    updates = [span for span in lanes or () if span["lane"] == "update"]
    phases: dict[str, float] = defaultdict(float)
    modules: dict[str, dict[str, float]] = defaultdict(lambda: {"forward": 0.0, "backward": 0.0})
    for step in steps:
        own = [span for span in compute if span["step"] == step]
        whole = {"start": own[0]["start"], "end": own[-1]["end"]}
        phases["step"] += whole["end"] - whole["start"]
        for span in own:
            ns = span["end"] - span["start"] - covered(span, waits) - covered(span, updates)
            if span["phase"] == "update":
                # An engine notes its updates; what else it does in step() is scheduling.
                phases["scheduler" if updates else "optimizer"] += ns
            else:
                phases[span["phase"]] += ns
                modules[span["name"]][span["phase"]] += ns
        if updates:
            phases["optimizer"] += covered(whole, updates)
        if lanes is not None:
            for kind in ("reduce_scatter", "all_gather", "other"):
                phases[f"exposed_{kind}"] += covered(whole, [wait for wait in waits if _kind(wait["name"]) == kind])
    found = {name: ns / len(steps) / 1e6 for name, ns in phases.items()} | _reported(reports, REPORTED)
    if lanes is None:  # a plain hook: DDP waits for it at the end of backward
        found |= (waited := _reported(reports, {"exposed_ms": "exposed_other"}))
        found["backward"] -= sum(waited.values())
        # That is in the span of whichever module's backward is the last.
        last = [span for span in compute if span["step"] in steps and span["phase"] == "backward"][-1:]
        for span in last:
            modules[span["name"]]["backward"] -= sum(waited.values()) * 1e6 * len(steps)
    return {
        "steps": len(steps),
        "step_ms": round(found["step"], 3),
        "phases": {name: round(found[name], 3) if name in found else None for name in PHASES},
        "modules": [
            {"name": name, **{f"{phase}_ms": round(ns / len(steps) / 1e6, 3) for phase, ns in times.items()}}
            for name, times in modules.items()
        ],
        "operators": None if lanes is None else _operators(compute, steps, lanes),
    }


def _kind(name: str) -> str:
    """Which half of an all-reduce an operator is, by the name that its backend gives it; "other" for neither."""
    letters = "".join(letter for letter in name.lower() if letter.isalpha())
    return next((kind for kind in ("reduce_scatter", "all_gather") if kind.replace("_", "") in letters), "other")


def _reported(reports: Sequence[dict[str, Any]], keys: dict[str, str]) -> dict[str, float]:
    """Means over the reports, by phase; without what no report has."""
    found = {}
    for key, phase in keys.items():
        values = [report[key] for report in reports if report.get(key) is not None]
        if values:
            found[phase] = statistics.mean(values)
    return found


def covered(span: Span, others: Iterable[Span]) -> int:
    """Nanoseconds of the span that the others cover, those that overlap each other counted once."""
    return sum(max(0, min(span["end"], end) - max(span["start"], begin)) for begin, end in _union(others))


def _operators(compute: Sequence[Span], steps: Sequence[int], lanes: Sequence[Span]) -> list[dict[str, Any]]:
    first = min(span["start"] for span in compute if span["step"] == steps[0])
    last = max(span["end"] for span in compute if span["step"] == steps[-1])
    moved: dict[str, list[Span]] = defaultdict(list)
    for span in lanes:
        if span["lane"] not in ("wait", "update") and first <= span["start"] < last:
            moved[span["name"] if span["lane"] == "communication" else span["lane"]].append(span)
    window = {"start": first, "end": last}
    waits = [span for span in lanes if span["lane"] == "wait"]

    def per_step(ns: float) -> float:
        return round(ns / len(steps) / 1e6, 3)

    return [
        {
            "name": name,
            "count": round(len(spans) / len(steps), 2),
            "in_flight_ms": per_step(sum(end - begin for begin, end in _union(spans))),
            "exposed_ms": per_step(covered(window, [wait for wait in waits if wait["name"].startswith(name)])),
        }
        for name, spans in sorted(moved.items(), reverse=True)  # a reduce-scatter, then its all-gather
    ]
