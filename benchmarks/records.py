"""The raw JSON of every benchmark: what it begins with, how it is written, and how it is read again."""

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import cuda
from .spelling import of_today

SCHEMA = 1  # raised when a reader of older files would misread newer ones
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"  # stored, in the repository


def header(benchmark: str, settings: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    """The first part of a result: what was run, with what, on what. Holds no host name and no path of this machine.

    device: where tensors live; for "cuda" the GPU is named, with the versions of CUDA and NCCL that torch has,
    and what else decides results there (cuda.py).
    """
    on, with_what = machine(), versions()
    if device == "cuda" and torch.cuda.is_available():
        on["gpu"] = torch.cuda.get_device_name()
        on["gpu_settings"] = cuda.settings()
        with_what["cuda"] = torch.version.cuda
        with_what["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {
        "benchmark": benchmark,
        "schema": SCHEMA,
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m {__package__}.{benchmark} {' '.join(sys.argv[1:])}".strip(),
        "commit": commit(),
        "machine": on,
        "versions": with_what,
        "settings": settings,
        **({"clocks": cuda.clocks()} if device == "cuda" else {}),
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
        git("ls-files", "--error-unmatch", __file__)  # an installed package may lie inside another checkout
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


class SourceError(ValueError):
    """A file cannot be read as a benchmark's results; the message says which, why and what to do."""


@dataclass(frozen=True)
class Source:
    """One file of raw results."""

    file: str  # its name, without the folder: the page names no place on a machine
    benchmark: str
    payload: dict[str, Any]

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.file.removesuffix(".json")

    @property
    def cells(self) -> list[dict[str, Any]]:
        return self.payload.get("cells", [])

    @property
    def when(self) -> str:
        return self.payload.get("when", "")

    @property
    def command(self) -> str:
        return self.payload.get("command", "")

    @property
    def commit(self) -> str:
        """Shortened to what a person reads; "+changes" stays, since it means that the commit is not the whole truth."""
        commit, changed, _ = self.payload.get("commit", "unknown").partition("+changes")
        return commit[:12] + changed

    @property
    def machine(self) -> str:
        machine = self.payload.get("machine", "unknown machine")
        if isinstance(machine, str):
            return machine
        memory = f", {machine['memory_gib']:g} GiB" if "memory_gib" in machine else ""
        gpu = f", {machine['gpu']}" if "gpu" in machine else ""
        return f"{machine.get('cpu', 'unknown processor')}, {machine.get('cores', '?')} cores{memory}{gpu}"

    @property
    def versions(self) -> str:
        found = self.payload.get("versions") or {name: self.payload.get(name) for name in ("python", "torch")}
        return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def load(paths: Iterable[Path]) -> list[Source]:
    """The sources, in the order of their file names. Raises SourceError."""
    sources = [_read(path) for path in sorted(set(paths), key=lambda path: (path.name, path))]
    names = [source.file for source in sources]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise SourceError(f"Two files are called {twice}: rename one, since the page tells them apart by name.")
    return sources


def _read(path: Path) -> Source:
    try:
        payload = json.loads(of_today(path.read_text()))
        # The kernels' results were written without the common header at first, then under another name.
        benchmark = payload.get("benchmark") or ("kernels" if "kernels" in payload else None)
        benchmark = "kernels" if benchmark == "compressors" else benchmark
        schema = payload.get("schema", SCHEMA)
    except (OSError, ValueError, AttributeError) as error:
        raise SourceError(
            f"{path} cannot be read as results ({error}): pass what --json of a benchmark wrote."
        ) from error
    if benchmark is None:
        raise SourceError(f"{path} holds no results of a benchmark: pass what --json of one wrote.")
    if schema > SCHEMA:
        raise SourceError(f"{path} was written by a newer version of the benchmarks: read it with that version.")
    return Source(path.name, benchmark, payload)


def of(sources: Iterable[Source], benchmark: str) -> list[Source]:
    """The sources that one benchmark wrote."""
    return [source for source in sources if source.benchmark == benchmark]


def provenance(sources: Sequence[Source]) -> list[str]:
    """One line for each machine, set of versions and commit: the files, and what they have in common."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for source in sources:
        names = groups.setdefault((source.machine, source.versions, source.commit), [])
        if source.file not in names:
            names.append(source.file)
    return [
        f"{', '.join(names)}: {machine}; {versions}; commit {commit}"
        for (machine, versions, commit), names in groups.items()
    ]
