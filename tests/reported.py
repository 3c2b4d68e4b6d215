"""Results as the benchmarks write them, small and with round numbers, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from canned import strategy

STEPS = {
    "none": 100.0,
    "ddp:1": 250.0,
    "ddp:25": 300.0,
    "ddp+fp16:4": 160.0,
    "dear:sharded": 200.0,
    "acp:4": 125.0,
}
WHERE = {"machine": {"cpu": "Abacus 9", "cores": 2, "memory_gib": 4.0, "kernel": "Linux"}, "versions": {"torch": "2.x"}}
PHASES = {"forward": 30.0, "backward": 60.0, "optimizer": 5.0, "exposed_reduce_scatter": 20.0, "decode": None}


def header(benchmark: str, when: str = "2026-01-01T00:00:00+00:00", **settings: Any) -> dict[str, Any]:
    about = {"command": f"python -m benchmarks.{benchmark}", "commit": "c0ffee" * 6, "settings": settings}
    return {"benchmark": benchmark, "schema": 1, "when": when, **about, **WHERE}


def training(rate: str = "500mbit", steps: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    """One cell, every strategy in two rounds of one step as long as `steps` says, and one that failed."""
    steps = STEPS if steps is None else steps
    found = [
        strategy(name, [[ms - 1], [2 * ms - 1]], breakdown=_breakdown(ms) if name.startswith("dear") else None)
        for name, ms in steps.items()
    ]
    for one in found:
        if one["name"].startswith("acp"):
            one["payload_bytes_per_step"] = 125_000
            for block in one["blocks"]:
                report = {"bytes_sent": 125_000, "dense_bytes": 12_500_000, "encode_ms": 6.0, "decode_ms": 1.5}
                block["compressor"] = [report, report]
    found.append(strategy("fsdp2", [], failure="rank 1: RuntimeError: no luck <today>"))
    experiment = {"optimizer": "sgd", "batch": 4, "rounds": 2, "warmup": 1, "steps": 1, "workload": "gpt"}
    cell = {"rate": rate, "network": "emulated network", "workers": 2, "plan": experiment, "strategies": found}
    return {**header("training"), "cells": [cell], **more}


def _breakdown(ms: float) -> dict[str, Any]:
    part = {"name": "block 1", "forward_ms": 3.0, "backward_ms": 6.0}
    moved = {"name": "reduce-scatter", "count": 4.0, "in_flight_ms": 50.0, "exposed_ms": 20.0}
    phases = {name: PHASES.get(name) for name in _phase_names()}
    return {"steps": 4, "step_ms": ms, "phases": phases, "modules": [part], "operators": [moved]}


def _phase_names() -> tuple[str, ...]:
    from benchmarks.training.breakdown import PHASES as names

    return names


def convergence(ratios: dict[str, float]) -> dict[str, Any]:
    """One seed of each strategy, whose held-out loss ends at 2 x its ratio."""
    cells = []
    for name, ratio in ratios.items():
        experiment = {"strategy": name, "seed": 1, "steps": 40, "batch": 4, "optimizer": "adamw", "learning_rate": 1e-3}
        losses = {"losses": [5.0 - step * 0.05 for step in range(40)], "held_out": [[20, 3.0], [40, 2 * ratio]]}
        cells.append({"plan": experiment, "workers": 2, "failure": None, "compressor": {}, **losses})
    return {**header("convergence", workers=2), "cells": cells}


def collectives(us: float = 1000.0, **more: Any) -> dict[str, Any]:
    block = {"us": [[us, us], [us - 1, us - 1]], "cpu_ms": [1.0, 3.0], "sent_bytes": [5, 5]}
    methods = [
        {"name": "all_reduce", "halves": 2, "failure": None, "wrong": 0, "blocks": [block, {**block, "round": 1}]},
        {
            "name": "native",
            "halves": 2,
            "failure": "rank 0: RuntimeError: [Errno 2] not here",
            "wrong": 0,
            "blocks": [],
        },
    ]
    experiment = {"methods": ["all_reduce", "native"], "sizes": [2**20], "dtype": "float", "rounds": 2, "iterations": 2}
    sizes = [{"bytes": 2**20, "count": 2**18, "methods": methods}]
    cell = {"rate": "1gbit", "network": "emulated network", "workers": 2, "plan": experiment, "sizes": sizes}
    return {**header("collectives"), "cells": [cell], **more}


def compressors() -> dict[str, Any]:
    """One family of one kernel."""
    times = {"median_s": 0.002, "best_s": 0.0018, "plain_median_s": 0.01, "plain_best_s": 0.009}
    kernel = {"name": "sign encode", "bytes": 12_000_000.0, "seconds": [0.002], **times}
    timed = {"cpus": 2, "wall_s": 1.0, "user_s": [1.5, 1.0], "copy_bytes_per_s": 8e9}
    cell = {"family": "sign", "plan": {}, **timed, "kernels": [kernel]}
    return {**header("kernels", numel=2**20, threads=2), "cells": [cell]}


def compressors_without_header() -> dict[str, Any]:
    """As written before the kernels' results had the common header, and cells."""
    (cell,) = compressors()["cells"]
    about = {"machine": "x86_64, Abacus 9, 2 cores", "torch": "2.x", "python": "3.x", "commit": "c0ffee", "threads": 2}
    return {**about, "load_average": 0.1, "copy_bytes_per_s": 8e9, "kernels": cell["kernels"]}


def bandwidth() -> dict[str, Any]:
    found = {"holds": "125mbit", "fails": "62mbit", "measured": [["125mbit", 1.12], ["62mbit", 1.31]]}
    needed = [{"workers": 4, "strategy": "acp:4", **found}]
    return {**header("bandwidth", limit=1.15), "cells": [], "needed": needed}


def write(folder: Path, **payloads: dict[str, Any]) -> list[Path]:
    """One file for each, called after its keyword."""
    paths = []
    for name, payload in payloads.items():
        paths.append(folder / f"{name.replace('_', '-')}.json")
        paths[-1].write_text(json.dumps(payload))
    return paths
