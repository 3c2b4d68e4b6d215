"""The loop that the benchmarks share: one cell after another, shown and kept as soon as it is there, and resumable.

A cell is what is measured in one go: one number of workers, one rate, one plan. A benchmark hands over its plans and
how one cell is measured; which cells there are, the network, progress, the JSON file and what of it is there already
are taken care of here.

    BENCHMARK = cells.Benchmark("training", measure, run_cell, summary.show)

    def arguments():
        parser = Parser(...)
        cells.options(parser)                      # --workers --rates --network --backend --device --json --resume
        ...

    if __name__ == "__main__":
        cells.main(BENCHMARK, lambda: (given := arguments(), {"": Plan(...)}))
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import records
from benchmarks.command import UNLIMITED, fail, terminal
from benchmarks.crew import Crew, launched
from benchmarks.launch import Report, WorkersFailed, progress_bar, worker
from benchmarks.network import AS_LAUNCHED, Network, NetworkError, network_options, open_network

# What a second try adds to a plan when a contestant took its worker down: a finding, and no other plan.
FOUND = "excluded"
# What must be the same for two cells to stand in one file.
SAME = ("benchmark", "schema", "commit", "machine", "versions")

RunCell = Callable[[Network, Any, Report], dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """What distinguishes one benchmark from another. Plans are dataclasses of plain values.

    A plan's fields `backend` and `device`, where it has them, say what its workers' groups and tensors are.
    """

    name: str  # as in benchmarks.<name>, whose module runs `measure` when it is started with --worker
    measure: Callable[[Crew, dict[str, Any], Report], dict[str, Any]]  # a worker's part of one cell; "plan" is in it
    run_cell: RunCell  # starts the workers of one cell: run_workers(...)
    show: Callable[[dict[str, Any], Console], None]  # prints one cell


class Differs(ValueError):
    """The file that is to be resumed holds something else; the message says what, and what to do."""


@dataclass
class Kept:
    """The cells of one run, in a file where `path` is given; only rank 0, or whoever starts the workers, has one.

    A cell is what a benchmark measured, its "plan", and what tells it from the others of the file.
    """

    payload: dict[str, Any]
    path: Path | None = None
    resumed: list[dict[str, Any]] = field(default_factory=list)  # cells found in the file

    @classmethod
    def open(cls, header: dict[str, Any], path: Path | None, resume: bool) -> "Kept":
        """Begins with no cell, or, to `resume`, with those of the file, if there is one.

        Raises Differs if the file is of another benchmark, commit, machine or version, or none was named to resume.
        """
        kept = cls(header | {"cells": []}, path)
        if resume and path is None:
            raise Differs("There is nothing to resume without a file: name it with --json.")
        if not resume or path is None or not path.exists():
            return kept
        try:
            before = json.loads(path.read_text())
            kept.resumed = before["cells"]
            found = {name: before[name] for name in SAME}
        except (ValueError, KeyError, TypeError) as error:
            raise Differs(
                f"{path} holds no results of a benchmark, so it cannot be resumed: name another file with --json."
            ) from error
        for name in SAME:
            if found[name] != header[name]:
                raise Differs(
                    f"{path} was measured with another {name} ({difference(found[name], header[name])}), so it cannot "
                    "be resumed: leave out --resume to begin anew, or name another file with --json."
                )
        kept.payload["cells"] = list(kept.resumed)
        return kept

    def find(self, where: Mapping[str, Any], plan: Any) -> dict[str, Any] | None:
        """The cell that was resumed for this, if there is one. Raises Differs if it had another plan.

        where: what tells the cell from the others of the file; what is "" there, the cell does not have.
        """
        for cell in self.resumed:
            if any(cell.get(name, "") != value for name, value in where.items()):
                continue
            then, now = ({k: v for k, v in one.items() if k != FOUND} for one in (cell["plan"], asdict(plan)))
            if then != now:
                known = ", ".join(f"{name} {value}" for name, value in where.items() if value != "")
                raise Differs(
                    f"{self.path} holds {known}, with another plan ({difference(then, now)}), so it cannot be resumed: "
                    "give the same options, or name another file with --json."
                )
            return cell
        return None

    def add(self, cell: dict[str, Any]) -> None:
        """Keeps a cell, and writes the file: an interrupt loses only the cell it interrupts."""
        self.payload["cells"].append(cell)
        if self.path:
            records.write(self.path, self.payload)


def obtain(
    kept: Kept,
    where: Mapping[str, Any],
    plan: Any,
    title: str,
    measure: Callable[[Report], dict[str, Any]],
    console: Console,
) -> dict[str, Any]:
    """The cell that the file holds already, or else one measured now, with `where` in it, and kept."""
    cell = kept.find(where, plan)
    if cell is not None:
        console.print(f"{title}: resumed", highlight=False)
        return cell
    with progress_bar(console, title) as report:
        cell = _labelled(where, measure(report))
    kept.add(cell)
    return cell


def difference(then: Any, now: Any, name: str = "") -> str:
    """The first difference of two values of JSON, for people: "rounds: 4 then, 8 now"; empty if they are equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        found = (difference(then.get(k), now.get(k), f"{name}.{k}".strip(".")) for k in sorted(then.keys() | now))
        return next(filter(None, found), "")
    return "" if then == now else f"{name}: {then} then, {now} now".removeprefix(": ")


def options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark made of cells takes."""
    network_options(parser)
    parser.add_argument("--backend", default="gloo", help="of the process groups, such as gloo, nccl (default: gloo)")
    parser.add_argument("--device", default="cpu", help="where tensors live, cpu or cuda (default: cpu)")
    file_options(parser)


def file_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where cells are kept."""
    parser.add_argument("--json", type=Path, help="where the raw times go, such as benchmarks/results/training.json")
    parser.add_argument("--resume", action="store_true", help="keep the cells that the --json file holds already")


def main(benchmark: Benchmark, arguments: Callable[[], tuple[argparse.Namespace, Mapping[str, Any]]]) -> None:
    """What a benchmark's module does when it is run: be a worker of a cell, or measure all cells.

    `arguments` reads the command line into options (those of `options` among them) and plans by name: every number of
    workers at every rate is measured with every plan. A plan's name is in its cells as "variant"; one that needs no
    name has an empty one.
    """
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), benchmark.measure)
        return
    given, plans = arguments()
    with ended_by_a_sentence(given.json):
        if launched():
            _as_launched(benchmark, given, plans)
        else:
            _on_a_network(benchmark, given, plans)


@contextmanager
def ended_by_a_sentence(path: Path | None) -> Iterator[None]:
    """What ends a benchmark early, an interrupt among it, is said in one sentence on stderr, and ends the program."""
    try:
        yield
    except (Differs, NetworkError, WorkersFailed) as error:
        fail(str(error))
    except KeyboardInterrupt:
        kept = f"; finished cells are in {path}, and --resume goes on from there" if path else ""
        print(f"Interrupted{kept}.", file=sys.stderr)
        raise SystemExit(130) from None


def _open(benchmark: Benchmark, given: argparse.Namespace) -> Kept:
    header = records.header(benchmark.name, {"workers": given.workers, "rates": given.rates}, given.device)
    return Kept.open(header, given.json, given.resume)


def _on_a_network(benchmark: Benchmark, given: argparse.Namespace, plans: Mapping[str, Any]) -> None:
    """Starts the workers of every cell on the network asked for."""
    console, kept = terminal(), _open(benchmark, given)
    done, begun = 0, time.monotonic()
    for workers in given.workers:
        with open_network(given.network, workers) as network:
            console.print(network.description)
            rates = network.possible(given.rates)
            total = len(given.workers) * len(rates) * len(plans)
            todo = [(place(workers, rate, network.name, name), plan) for rate in rates for name, plan in plans.items()]
            for where, plan in todo:
                kept.find(where, plan)  # what cannot be resumed is said before hours are spent on the others
            for where, plan in todo:
                done += 1
                what = ", ".join(filter(None, [where["rate"], where["variant"]]))
                title = f"cell {done} of {total}: {workers} workers, {what}"
                measure = partial(run_at, where["rate"], benchmark.run_cell, network, plan)
                benchmark.show(obtain(kept, where, plan, title, measure, console), console)
    minutes = (time.monotonic() - begun) / 60
    console.print(f"Cells: {done}, in {minutes:.1f} min.", highlight=False)
    if given.json:
        console.print(f"Raw times: {given.json}", highlight=False)


def place(workers: int, rate: str, network: str, variant: str) -> dict[str, Any]:
    """What tells a cell from the others, where cells differ in network, rate and plan."""
    return {"workers": workers, "rate": rate, "network": network, "variant": variant}


def run_at(rate: str, run_cell: RunCell, network: Network, plan: Any, report: Report) -> dict[str, Any]:
    """Runs a cell with the links of the network limited to that rate."""
    network.set_rate(rate)
    return run_cell(network, plan, report)


def _as_launched(benchmark: Benchmark, given: argparse.Namespace, plans: Mapping[str, Any]) -> None:
    """Every process is a worker already, on the network as it is; rank 0 also shows and keeps."""
    try:
        crew = Crew(given.backend, given.device)
    except RuntimeError as error:
        fail(f"These processes cannot join one another: {error}")
    console = terminal() if crew.rank == 0 else Console(quiet=True)
    kept, found, problem = None, {}, None
    places = {name: place(crew.world, UNLIMITED, AS_LAUNCHED, name) for name in plans}
    if crew.rank == 0:
        try:
            kept = _open(benchmark, given)
            found = {name: kept.find(places[name], plan) for name, plan in plans.items()}
        except Differs as error:
            problem = str(error)
    found, problem = crew.gather((found, problem))[0]  # only rank 0 needs to see the file
    if problem:
        crew.leave()
        raise SystemExit(1) if crew.rank else Differs(problem)
    for number, (name, plan) in enumerate(plans.items(), 1):
        cell = found[name]
        title = ", ".join(filter(None, [f"cell {number} of {len(plans)}: {AS_LAUNCHED}", name]))
        if cell is None:
            with progress_bar(console, title) as report:
                cell = _labelled(places[name], benchmark.measure(crew, asdict(plan), report))
            if kept:
                kept.add(cell)
        if kept:
            benchmark.show(cell, console)
    crew.leave()


def _labelled(where: Mapping[str, Any], cell: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in where.items() if value != ""} | cell
