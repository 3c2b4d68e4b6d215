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

from ..tracing import Tracer, check_steps
from ..writing import check_writable


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("trace.json"), help="where rank 0's trace goes (trace.json)")
    parser.add_argument("--steps", type=int, default=5, help="to trace (5)")
    parser.add_argument("--skip", type=int, default=3, help="before the first that is traced (3)")
    parser.add_argument("script", type=Path, help="that calls dear.attach()")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")


def run(given: argparse.Namespace) -> None:
    if not given.script.is_file():
        raise ValueError(f"There is no script {given.script}: name a file of Python.")
    check_steps(given.steps, given.skip)
    check_writable("--out", given.out)
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
    print(f"The trace is {tracers[0].path}: open it in Perfetto or chrome://tracing.")
