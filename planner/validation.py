"""Predicted against measured step times, over stored results of the training benchmark: python -m planner.validation

The profile of each cell is the model's shapes and that cell's own compute floor (`none`); everything else of the lab
comes from the few files that planner/lab.py names, which are not predicted here. A measured time is the floor and the
median over rounds of what a strategy takes beyond the floor of its round. How sure measured first places are is what
one half of the rounds says of the other half.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import models
from .codecs import codec
from .lab import FITTED_ON, GLOO, Lab
from .profile import Profile
from .rounds import FLOOR, Rounds
from .schedules import default_cap
from .simulate import Method, step

MIB = float(1 << 20)
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
QUIET = 0.1  # a machine is, where no round's compute floor takes longer than another's by more than that share
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
    rounds: Rounds = field(repr=False)  # of the cell

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Summary:
    """Of relative errors without their sign. first: the share of cells in which the strategy that is predicted to be
    the fastest is so, or within 3% of it. level: the same, or the rounds do not tell it and the fastest apart. repeats:
    the share of halves of rounds whose first place, or one within 3% of it, the other half of the cell says; None where
    there are none."""

    points: int
    median: float
    p90: float
    cells: int
    first: float
    level: float
    repeats: float | None


UNTIMED = ("int8", "fp8", "int4", "int3", "int2", "fast")  # codecs of whose encoding the lab has no breakdown


def method_of(name: str, profile: Profile) -> Method | None:
    """The benchmarks' strategy of that name; None for one that the planner does not know."""
    kind, *options = (word for word in name.split(":") if "=" not in word)  # which changes no more than a few bytes
    if (
        kind in ("ddp+powersgd", "fsdp2+bf16", "none", "auto", "planned", "tried")
        or kind.removeprefix("dear+") == "local"
    ):
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
            if all(one["name"] != FLOOR for one in cell["strategies"]):  # the profile of the step
                continue
            workload = cell["plan"].get("workload") or "gpt"
            model, rounds = models.built_in(workload), Rounds.of(cell)
            floor = rounds.floor - lab.barrier(workers)  # which nothing else has
            update = min(lab.update(optimizer, model.parameters), floor / 2)
            profile = model.profile(floor - update, update)
            for name in rounds.excess:
                method = method_of(name, profile)
                if method is None or method.codec.name in UNTIMED:
                    continue
                network = lab.network(cell["rate"], workers, **({"methods": GLOO} if name == "fsdp2" else {}))
                predicted = step(profile, network, lab.machine(workers), method).seconds
                seconds = rounds.seconds(name)
                yield Point(path.name, number, workers, cell["rate"], workload, name, seconds, predicted, rounds)


def summary(found: Sequence[Point]) -> Summary:
    errors = sorted(abs(point.error) for point in found)
    cells: dict[tuple[str, int], list[Point]] = {}
    for point in found:
        cells.setdefault((point.file, point.cell), []).append(point)
    good, level, halves = 0, 0, list[bool]()
    for own in cells.values():
        chosen = min(own, key=lambda point: point.predicted)
        fastest = min(own, key=lambda point: point.measured)
        is_good = chosen.measured <= NEAR * fastest.measured
        good += is_good
        level += is_good or not chosen.rounds.told_apart(chosen.strategy, fastest.strategy)
        halves += chosen.rounds.halves([point.strategy for point in own], NEAR) or []
    p90 = errors[min(len(errors) - 1, int(0.9 * len(errors)))]
    repeats = sum(halves) / len(halves) if halves else None
    median = statistics.median(errors)
    return Summary(len(errors), median, p90, len(cells), good / len(cells), level / len(cells), repeats)


def by(found: Sequence[Point], key: str) -> dict[str, Summary]:
    """A summary for each value of a field."""
    values: dict[str, list[Point]] = {}
    for point in found:
        values.setdefault(str(getattr(point, key)), []).append(point)
    return {value: summary(own) for value, own in sorted(values.items())}


def table(found: Sequence[Point]) -> str:
    """As Markdown."""
    head = ["predicted against measured", "points", "median error", "90th percentile"]
    head += ["first place right or within 3%", "or not told apart from it", "measured again"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    everything = {"all": summary(found)}
    everything |= {f"{workers} workers": each for workers, each in by(found, "workers").items()}
    everything |= {workload: each for workload, each in by(found, "workload").items()}
    quiet = [point for point in found if point.rounds.swing <= QUIET]
    if quiet:
        everything["quiet machine"] = summary(quiet)
        for workers, each in by(quiet, "workers").items():
            everything[f"quiet machine, {workers} workers"] = each
    for name, each in everything.items():
        first = f"{each.first:.0%} of {each.cells} cells"
        again = "" if each.repeats is None else f"{each.repeats:.0%}"
        rows.append(
            f"| {name} | {each.points} | {each.median:.1%} | {each.p90:.1%} | {first} | {each.level:.0%} | {again} |"
        )
    return "\n".join(rows)


def cells(found: Sequence[Point]) -> str:
    """A row for each cell, as Markdown: how far it is off as a whole, and how unsteady its machine was."""
    own: dict[tuple[str, int], list[Point]] = {}
    for point in found:
        own.setdefault((point.file, point.cell), []).append(point)
    rows = ["| file | workers | rate | model | points | median of errors | swing of the floor |", "|---" * 7 + "|"]
    for (file, _), points_ in own.items():
        one, middle = points_[0], statistics.median(point.error for point in points_)
        named = f"| {file} | {one.workers} | {one.rate} | {one.workload} | {len(points_)} "
        rows.append(f"{named}| {middle:+.1%} | {one.rounds.swing:.0%} |")
    return "\n".join(rows)


def _plain(point: Point) -> dict[str, Any]:
    found = asdict(point)
    del found["rounds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m planner.validation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="folder of raw results")
    parser.add_argument("--json", type=Path, help="write every point there")
    parser.add_argument("--cells", action="store_true", help="a row for each cell, too")
    given = parser.parse_args()
    found = list(points(given.results))
    print(table(found))
    if given.cells:
        print(f"\n{cells(found)}")
    if given.json:
        payload = {"label": "predicted", "summary": asdict(summary(found)), "points": [_plain(each) for each in found]}
        given.json.write_text(json.dumps(payload, indent=1) + "\n")


if __name__ == "__main__":
    main()
