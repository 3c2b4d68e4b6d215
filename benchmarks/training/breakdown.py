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

Span = dict[Any, Any]


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

    compute, lanes: as of timeline.record; lanes is None where exchanges could not be seen: waits are then inside the
    phase in which they fell, unless the reports say how long they were. reports: what the strategy says of its steps.

    Returns "phases": time of the training thread by what it did (PHASES), None where unknown; "encode", "merge"
    (between exchanges) and "decode" may run beside the others. "modules": by part. "operators": by what moved, None
    where unknown.
    """
    import pandas as pd  # here: the workers that are timed have no use for it

    spans = pd.DataFrame(compute)
    count = spans.step.nunique() - 2
    spans = spans[spans.step.between(spans.step.min(), spans.step.max(), inclusive="neither")].copy()
    waits, updates = ([span for span in lanes or () if span["lane"] == lane] for lane in ("wait", "update"))

    def per_step(ns: Iterable[float]) -> float:
        return sum(ns) / count / 1e6

    steps = [{"start": own.start.iloc[0], "end": own.end.iloc[-1]} for _, own in spans.groupby("step")]
    spans["ns"] = [
        span["end"] - span["start"] - covered(span, waits) - covered(span, updates) for span in spans.to_dict("records")
    ]
    found = {str(phase): per_step(own.ns) for phase, own in spans.groupby("phase")} | _reported(reports, REPORTED)
    # An engine notes its updates; what else it does in step() is scheduling.
    found["scheduler" if updates else "optimizer"] = found.pop("update")
    if updates:
        found["optimizer"] = per_step(covered(step, updates) for step in steps)
    if lanes is not None:
        for kind in ("reduce_scatter", "all_gather", "other"):
            own = [wait for wait in waits if _kind(wait["name"]) == kind]
            found[f"exposed_{kind}"] = per_step(covered(step, own) for step in steps)
    else:  # a plain hook: DDP waits for it at the end of backward, in the span of whichever module's is the last
        found |= (waited := _reported(reports, {"exposed_ms": "exposed_other"}))
        found["backward"] -= sum(waited.values())
        last = spans[spans.phase == "backward"].index[-1]
        spans.loc[last, "ns"] -= sum(waited.values()) * 1e6 * count
    modules = spans[spans.phase != "update"].groupby(["name", "phase"], sort=False).ns.apply(per_step).round(3)
    return {
        "steps": count,
        "step_ms": round(per_step(step["end"] - step["start"] for step in steps), 3),
        "phases": {name: round(found[name], 3) if name in found else None for name in PHASES},
        "modules": [
            {"name": name, **{f"{phase}_ms": modules.get((name, phase), 0.0) for phase in ("forward", "backward")}}
            for name in modules.index.unique("name")
        ],
        "operators": None if lanes is None else _operators(steps, lanes),
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


def _operators(steps: Sequence[Span], lanes: Sequence[Span]) -> list[dict[str, Any]]:
    window = {"start": steps[0]["start"], "end": steps[-1]["end"]}
    moved: dict[str, list[Span]] = defaultdict(list)
    for span in lanes:
        if span["lane"] not in ("wait", "update") and window["start"] <= span["start"] < window["end"]:
            moved[span["name"] if span["lane"] == "communication" else span["lane"]].append(span)
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
