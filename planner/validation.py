"""Predicted against measured step times, over stored results of the training benchmark: python -m planner.validation

The profile of each cell is the model's shapes and that cell's own compute floor (`none`); everything else of the lab
comes from the few files that planner/lab.py names, which are not predicted here. A measured time is the floor and the
median over rounds of what a strategy takes beyond the floor of its round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import models
from .codecs import codec
from .lab import FITTED_ON, GLOO, Lab
from .profile import Profile
from .schedules import default_cap
from .simulate import Method, step

MIB = float(1 << 20)
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
NEAR = 1.03  # a choice that is this close to the best is as good


@dataclass(frozen=True)
class Point:
    """A strategy in a cell; seconds. cell: which one, of which file."""

    file: str
    cell: int
    workers: int
    rate: str
    workload: str
    strategy: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Summary:
    """Of relative errors without their sign. first: the share of cells in which the strategy that is predicted to be
    the fastest is so, or within 3% of it."""

    points: int
    median: float
    p90: float
    cells: int
    first: float


def method_of(name: str, profile: Profile) -> Method | None:
    """The benchmarks' strategy of that name; None for one that the planner does not know."""
    kind, *options = name.split(":")
    if kind in ("ddp+powersgd", "none"):
        return None

    def cap() -> float | None:
        return float(options.pop(0)) * MIB if options else None

    if kind == "ddp":
        return Method("ddp", cap=cap())
    if kind == "ddp+fp16":
        return Method("ddp", codec("fp16"), cap())
    if kind == "fsdp2":
        return Method("fsdp2")
    if kind == "dear":
        schedule = options.pop(0) if options else "sharded"
        return Method("sharded" if schedule == "auto" else schedule, cap=cap() or default_cap(profile))
    compressor = kind.removeprefix("dear+")
    if compressor in ("power", "acp", "topk"):
        compressor += f":{options.pop(0)}"
    elif compressor == "sign":
        options = [option for option in options if option != "majority"]
    return Method("replicated" if kind.startswith("dear+") else "hook", codec(compressor), cap())


def times(cell: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The floor of a cell, and each strategy's seconds, paired with the floor by round."""
    rounds = {
        one["name"]: {
            block["round"]: statistics.median(max(ranks) for ranks in zip(*block["ms"], strict=True)) / 1e3
            for block in one["blocks"]
        }
        for one in cell["strategies"]
        if not one.get("failure")
    }
    floors = rounds["none"]
    floor = statistics.median(floors.values())
    return floor, {
        name: floor + statistics.median(seconds - floors[number] for number, seconds in own.items() if number in floors)
        for name, own in rounds.items()
    }


def points(results: Path = RESULTS) -> Iterator[Point]:
    """Every strategy that was measured and can be predicted."""
    lab = Lab.read(results)
    for path in sorted(results.glob("training*.json")):
        if path.name in FITTED_ON:
            continue
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            optimizer, workers = cell["plan"]["optimizer"], cell["workers"]
            if optimizer not in ("sgd", "adamw") or cell.get("node_size"):  # the lab's links are a worker's own
                continue
            workload = cell["plan"].get("workload") or "gpt"
            model, (floor, measured) = models.built_in(workload), times(cell)
            update = min(lab.update(optimizer, model.parameters), floor / 2)
            profile = model.profile(floor - update, update)
            for name, seconds in measured.items():
                method = method_of(name, profile)
                if method is None or method.codec.name in ("int8", "fp8"):  # whose encoding no breakdown has
                    continue
                network = lab.network(cell["rate"], workers, **({"methods": GLOO} if name == "fsdp2" else {}))
                predicted = step(profile, network, lab.machine(workers), method).seconds
                yield Point(path.name, number, workers, cell["rate"], workload, name, seconds, predicted)


def summary(found: Sequence[Point]) -> Summary:
    errors = sorted(abs(point.error) for point in found)
    cells: dict[tuple[str, int], list[Point]] = {}
    for point in found:
        cells.setdefault((point.file, point.cell), []).append(point)
    good = 0
    for own in cells.values():
        chosen = min(own, key=lambda point: point.predicted)
        good += chosen.measured <= NEAR * min(point.measured for point in own)
    p90 = errors[min(len(errors) - 1, int(0.9 * len(errors)))]
    return Summary(len(errors), statistics.median(errors), p90, len(cells), good / len(cells))


def by(found: Sequence[Point], key: str) -> dict[str, Summary]:
    """A summary for each value of a field."""
    values: dict[str, list[Point]] = {}
    for point in found:
        values.setdefault(str(getattr(point, key)), []).append(point)
    return {value: summary(own) for value, own in sorted(values.items())}


def table(found: Sequence[Point]) -> str:
    """As Markdown."""
    rows = ["| predicted against measured | points | median error | 90th percentile | first place right or within 3% |"]
    rows.append("|---|---|---|---|---|")
    everything = {"all": summary(found)}
    everything |= {f"{workers} workers": each for workers, each in by(found, "workers").items()}
    everything |= {workload: each for workload, each in by(found, "workload").items()}
    for name, each in everything.items():
        first = f"{each.first:.0%} of {each.cells} cells"
        rows.append(f"| {name} | {each.points} | {each.median:.1%} | {each.p90:.1%} | {first} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m planner.validation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="folder of raw results")
    parser.add_argument("--json", type=Path, help="write every point there")
    given = parser.parse_args()
    found = list(points(given.results))
    print(table(found))
    if given.json:
        payload = {"label": "predicted", "summary": asdict(summary(found)), "points": [asdict(each) for each in found]}
        given.json.write_text(json.dumps(payload, indent=1) + "\n")


if __name__ == "__main__":
    main()
