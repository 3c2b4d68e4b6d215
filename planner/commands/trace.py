"""python -m dear trace: runs a training script as it is, and traces a few steps of what it attaches.

torchrun --nproc-per-node 2 -m dear trace --out trace.json train.py --epochs 1
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path
from typing import Any

import dear

from ..timeline import busy, check_picture, draw
from ..tracing import Tracer, check_steps
from ..writing import check_json, check_writable, write_json


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("trace.json"), help="where rank 0's trace goes (trace.json)")
    parser.add_argument("--steps", type=int, default=5, help="to trace (5)")
    parser.add_argument("--skip", type=int, default=3, help="before the first that is traced (3)")
    parser.add_argument("--picture", type=Path, help="where a picture of rank 0's timeline goes, such as trace.png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where rank 0's milliseconds of a step by lane go")
    parser.add_argument("script", type=Path, help="that calls dear.attach()")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")


def run(given: argparse.Namespace) -> None:
    if not given.script.is_file():
        raise ValueError(f"There is no script {given.script}: name a file of Python.")
    check_steps(given.steps, given.skip)
    check_writable("--out", given.out)
    check_json(given.json)
    if given.picture is not None:
        check_writable("--picture", given.picture)
        check_picture(given.picture)
    tracers: list[Tracer] = []
    attach = dear.attach

    def traced(model: Any, *arguments: Any, **options: Any) -> Any:
        engine = attach(model, *arguments, **options)
        if not tracers:
            tracers.append(Tracer(engine, model, given.out, given.steps, given.skip))
        return engine

    argv = sys.argv
    dear.attach, sys.argv = traced, [str(given.script), *given.arguments]
    sys.path.insert(0, str(given.script.resolve().parent))
    try:
        runpy.run_path(str(given.script), run_name="__main__")
    finally:
        dear.attach, sys.argv = attach, argv
    if not tracers:
        raise ValueError(f"{given.script} never called dear.attach() by that name, so there is nothing to trace.")
    if not tracers[0].done:
        raise ValueError(f"{given.script} made too few training steps: lower --skip or --steps.")
    tracer = tracers[0]
    if tracer.rank == 0:
        lanes = busy(tracer.spans, given.steps)
        if not lanes.keys() - {"compute"}:
            print(
                'No exchange is in the trace: there is one rank alone, or plain DDP, or compressor="auto" was choosing '
                "(--skip 62 begins behind that)."
            )
        write_json(given.json, {"steps": given.steps, "ms_per_step": lanes})
        if given.picture is not None:
            draw(tracer.spans, given.picture)
            print(f"The picture is {given.picture}.")
    print(f"The trace is {tracer.path}: open it in Perfetto or chrome://tracing.")
