"""What every benchmark's JSON begins with, how it is written, and the few statistics the tables use."""

import hashlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1  # raised when a reader of older files would misread newer ones
ROOT = Path(__file__).resolve().parent.parent
SMOOTHED_OVER = 9  # steps: the loss of single batches of a few hundred bytes is noisy


def header(benchmark: str, settings: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """The first part of a result: what was run, with what, on what. Holds no host name and no path of this machine.

    device: where tensors live; for "cuda" the GPU is named, with the versions of CUDA and NCCL that torch has.
    """
    on, with_what = machine(), versions()
    if device == "cuda" and torch.cuda.is_available():
        on["gpu"] = torch.cuda.get_device_name()
        with_what["cuda"] = torch.version.cuda
        with_what["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {
        "benchmark": benchmark,
        "schema": SCHEMA,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m benchmarks.{benchmark} {' '.join(sys.argv[1:])}".strip(),
        "commit": commit(),
        "machine": on,
        "versions": with_what,
        "settings": settings,
    }


def commit() -> str:
    """The checked-out commit, "unknown" outside a checkout.

    Where tracked files differ from it, "+changes-" and a digest of the difference follow, so that two states of a
    checkout do not pass for one. Committed results are left out: a benchmark writes them, and does not read them.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("diff", "HEAD", "--binary", "--", ".", ":!benchmarks/results")
        digest = hashlib.sha256(changes.encode()).hexdigest()[:8]
        return git("rev-parse", "HEAD") + (f"+changes-{digest}" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory, kernel."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(int((_field("/proc/meminfo", "MemTotal") or "0 kB").split()[0]) / 2**20, 1),
        "kernel": f"{platform.system()} {platform.release()}",
    }


def cpus() -> int | None:
    """All processors of this machine, also those that this process may not use: what its CPU time is a share of."""
    return os.cpu_count()


def congestion_control() -> str | None:
    """TCP's, in this process's network namespace: how fast connections start again after a pause is up to it."""
    try:
        return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    except OSError:
        return None


def _field(path: str, name: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def versions() -> dict[str, str | None]:
    """Versions of Python and of what the numbers depend on; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "numpy", "dear-torch", "mpi4py"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def write(path: Path, payload: dict[str, Any]) -> None:
    """Writes JSON so that a reader, or an interrupt, never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(_one_line_per_series(json.dumps(payload, indent=1)) + "\n")
    partial.replace(path)


def _one_line_per_series(text: str) -> str:
    """Puts each list of plain numbers on one line: a file of step times stays readable, and its diffs small."""
    return re.sub(r"\[[-+.\deE,\s]+\]", lambda found: " ".join(found[0].split()), text)


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile by linear interpolation between the two nearest of the sorted values."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("A percentile of no values was asked for: measure at least one.")
    place = (len(ordered) - 1) * percent / 100
    below, above = math.floor(place), math.ceil(place)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def trailing_mean(values: Sequence[float], over: int = SMOOTHED_OVER) -> list[float]:
    """The mean of each value and of those up to `over` - 1 before it."""
    return [statistics.mean(values[max(0, end - over) : end]) for end in range(1, len(values) + 1)]


def first_at(curve: Sequence[float], target: float) -> int | None:
    """How many steps it took until the loss was at the target, or None."""
    return next((step for step, loss in enumerate(curve, start=1) if loss <= target), None)


def slowest_rank(per_rank: Sequence[Sequence[float]]) -> list[float]:
    """Per step, the longest time of any rank: a step is over when the last rank is."""
    return [max(times) for times in zip(*per_rank, strict=True)]


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of theirs / ours, each pair measured moments apart: above 1 means ours took less time.

    A ratio of two medians would compare moments that may lie minutes apart; on a machine that drifts, pairs do not.
    """
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
