"""Reads what --json of the benchmarks wrote, and says of every file where it comes from."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import SCHEMA


class SourceError(ValueError):
    """A file cannot be read as a benchmark's results; the message says which, why and what to do."""


@dataclass(frozen=True)
class Source:
    """One file of raw results."""

    file: str  # its name, without the folder: the page names no place on a machine
    benchmark: str
    payload: dict[str, Any]

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
        payload = json.loads(path.read_text())
        # The kernels' results were written without the common header at first.
        benchmark = payload.get("benchmark") or ("compressors" if "kernels" in payload else None)
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
