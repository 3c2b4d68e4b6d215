"""The loop that the benchmarks share: one cell after another, shown and stored as soon as it is there, and resumable.

A cell is what is measured in one go: one number of workers, one rate, one experiment. A benchmark hands over its
experiments and how one cell is measured; which cells there are, the network, progress, the JSON file and what of it is
there already are taken care of here. In the file an experiment stands under its former name, "plan".

    BENCHMARK = cells.Benchmark("training", measure, run_cell, show)

    parser = Parser(__package__, __doc__)
    cells.options(parser)                      # --workers --rates --network --backend --device --json --resume
    measured = cells.main(BENCHMARK, parser.parse_args(), {"": Experiment(...)})
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

from . import progress, records
from .command import fail, listed, positive, rate, terminal, worker_count
from .launch import Measure, WorkersFailed
from .network.lab import KINDS, Lab, Loopback, open_lab
from .network.namespaces import NetworkUnavailable
from .network.nodes import NodesLab
from .network.rates import UNLIMITED
from .progress import Part, Report
from .worker import Worker, launched

# What a second try adds to an experiment when a candidate took its worker down: a finding, and no other experiment.
FOUND = "excluded"
# What must be the same for two cells to stand in one file.
SAME = ("benchmark", "schema", "commit", "machine", "versions")
# Starts the workers of one cell, given its experiment: launch.run_workers(...).
RunCell = Callable[[Lab | Loopback, Any, Report], dict[str, Any]]
AS_LAUNCHED = "as launched"  # by torchrun, mpirun or srun: the network is whatever connects the processes


@dataclass(frozen=True)
class Benchmark:
    """What distinguishes one benchmark from another. Experiments are dataclasses of plain values.

    An experiment's fields `backend` and `device`, where it has them, say what its workers' groups and tensors are.
    """

    name: str
    measure: Measure  # a worker's part of one cell; "plan" is in it
    run_cell: RunCell
    show: Callable[[dict[str, Any], Console], None]  # prints one cell


class Differs(ValueError):
    """The file that is to be resumed holds something else; the message says what, and what to do."""


@dataclass
class Store:
    """The cells of one run, in a file where `path` is given. Rank 0 has one, or the process that starts the workers.

    A cell is what a benchmark measured, its "plan", and what tells it from the others of the file.
    """

    payload: dict[str, Any]
    path: Path | None = None
    resumed: list[dict[str, Any]] = field(default_factory=list)  # cells found in the file

    @classmethod
    def open(cls, header: dict[str, Any], path: Path | None, resume: bool) -> "Store":
        """Begins with no cell, or, to `resume`, with those of the file, if there is one.

        Raises Differs if the file is of another benchmark, commit, machine or version, or none was named to resume.
        """
        store = cls(header | {"cells": []}, path)
        if resume and path is None:
            raise Differs("There is nothing to resume without a file: name it with --json.")
        if not resume or path is None or not path.exists():
            return store
        try:
            before = json.loads(path.read_text())
            store.resumed = before["cells"]
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
        store.payload["cells"] = list(store.resumed)
        return store

    def find(self, where: Mapping[str, Any], experiment: Any) -> dict[str, Any] | None:
        """The cell that was resumed for this, if there is one. Raises Differs if it had another experiment.

        where: what tells the cell from the others of the file; what is "" there, the cell does not have.
        """
        for cell in self.resumed:
            if any(cell.get(name, "") != value for name, value in where.items()):
                continue
            then, now = ({k: v for k, v in one.items() if k != FOUND} for one in (cell["plan"], asdict(experiment)))
            if then != now:
                known = ", ".join(f"{name} {value}" for name, value in where.items() if value != "")
                raise Differs(
                    f"{self.path} holds {known}, with another experiment ({difference(then, now)}), so it cannot be "
                    "resumed: give the same options, or name another file with --json."
                )
            return cell
        return None

    def obtain(
        self,
        where: Mapping[str, Any],
        experiment: Any,
        part: Part,
        title: str,
        measure: Callable[[Report], dict[str, Any]],
        console: Console,
    ) -> dict[str, Any]:
        """The cell that the file holds already, or else one measured now, with `where` in it, and stored."""
        cell = self.find(where, experiment)
        if cell is not None:
            progress.resumed(console, f"{part}: {title}", part)
            return cell
        with progress.bar(console, f"{part}: {title}", part) as report:
            cell = {name: value for name, value in where.items() if value != ""} | measure(report)
        self.payload["cells"].append(cell)
        self.write()
        return cell

    def write(self) -> None:
        """Writes the file, after each cell: an interrupt loses only the cell it interrupts."""
        if self.path:
            records.write(self.path, self.payload)


def difference(then: Any, now: Any, name: str = "") -> str:
    """The first difference of two values of JSON, for people: "rounds: 4 then, 8 now"; empty if they are equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        found = (difference(then.get(k), now.get(k), f"{name}.{k}".strip(".")) for k in sorted(then.keys() | now))
        return next(filter(None, found), "")
    return "" if then == now else f"{name}: {then} then, {now} now".removeprefix(": ")


def options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark made of cells takes."""
    parser.add_argument("--workers", type=listed(worker_count), default=[2], help="how many, or several such as 2,4")
    parser.add_argument("--rates", type=listed(rate), default=["1gbit"], help="such as 500mbit,1gbit,unlimited")
    network_option(parser)
    parser.add_argument(
        "--node-size", type=positive, default=1, help="workers that share one port, with no limit between them (netns)"
    )
    parser.add_argument("--backend", default="gloo", help="of the process groups, such as gloo, nccl (default: gloo)")
    parser.add_argument("--device", default="cpu", help="where tensors live, cpu or cuda (default: cpu)")
    file_options(parser)


def network_option(parser: argparse.ArgumentParser) -> None:
    """The option that says which network; netns fails where it cannot be had, auto then takes loopback."""
    parser.add_argument("--network", choices=KINDS, default="auto")


def file_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where cells are stored."""
    parser.add_argument("--json", type=Path, help="where the raw times go, such as benchmarks/results/training.json")
    parser.add_argument("--resume", action="store_true", help="keep the cells that the --json file holds already")


def main(benchmark: Benchmark, given: argparse.Namespace, experiments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Measures all cells, and returns them: every number of workers at every rate with every experiment.

    given: the options, those of `options` among them. An experiment's name is in its cells as "variant"; one that needs
    no name has an empty one. Where a launcher started this process, it is one worker, and only rank 0 has the cells.
    """
    with ended_by_a_sentence(given.json):
        return (_as_launched if launched() else _on_a_network)(benchmark, given, experiments)


@contextmanager
def ended_by_a_sentence(path: Path | None) -> Iterator[None]:
    """What ends a benchmark early, an interrupt among it, is said in one sentence on stderr, and ends the program."""
    try:
        yield
    except (Differs, NetworkUnavailable, WorkersFailed) as error:
        fail(str(error))
    except KeyboardInterrupt:
        stored = f"; finished cells are in {path}, and --resume goes on from there" if path else ""
        print(f"Interrupted{stored}.", file=sys.stderr)
        raise SystemExit(130) from None


def _open(benchmark: Benchmark, given: argparse.Namespace) -> Store:
    header = records.header(benchmark.name, {"workers": given.workers, "rates": given.rates}, given.device)
    return Store.open(header, given.json, given.resume)


def _on_a_network(
    benchmark: Benchmark, given: argparse.Namespace, experiments: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Starts the workers of every cell on the network asked for."""
    console, store, begun = terminal(), _open(benchmark, given), time.monotonic()
    cells: list[dict[str, Any]] = []
    for workers in given.workers:
        with open_network(workers, given) as lab:
            console.print(lab.about)
            rates = lab.possible(given.rates)
            total = len(given.workers) * len(rates) * len(experiments)
            place_of = partial(place, workers, node_size=lab.node_size)
            todo = [
                (place_of(rate, lab.name, name), experiment)
                for rate in rates
                for name, experiment in experiments.items()
            ]
            for where, experiment in todo:
                store.find(where, experiment)  # what cannot be resumed is said before hours are spent on the others
            for where, experiment in todo:
                title = ", ".join(filter(None, [f"{workers} workers", where["rate"], where["variant"]]))
                measure = partial(run_at, lab, where["rate"], benchmark.run_cell, experiment)
                cell = store.obtain(where, experiment, Part(len(cells) + 1, total), title, measure, console)
                benchmark.show(cell, console)
                cells.append(cell)
    console.print(f"Cells: {len(cells)}, in {(time.monotonic() - begun) / 60:.1f} min.", highlight=False)
    if given.json:
        console.print(f"Raw times: {given.json}", highlight=False)
    return cells


def open_network(workers: int, given: argparse.Namespace) -> Lab | Loopback:
    """The network that the options ask for. Raises NetworkUnavailable."""
    if given.node_size == 1:
        return open_lab(workers, None, given.network)
    if workers % given.node_size:
        fail(f"--node-size {given.node_size} does not divide {workers} workers: give a divisor.")
    if given.network == "loopback":
        fail("--node-size needs the emulated network: leave it out, or leave out --network loopback.")
    return NodesLab(workers // given.node_size, given.node_size)


def place(workers: int, rate: str, network: str, variant: str, node_size: int = 1) -> dict[str, Any]:
    """What tells a cell from the others, where cells differ in network, rate and experiment."""
    nodes = {"node_size": node_size if node_size > 1 else ""}
    return {"workers": workers, "rate": rate, "network": network, "variant": variant} | nodes


def run_at(lab: Lab | Loopback, rate: str, run_cell: RunCell, experiment: Any, report: Report) -> dict[str, Any]:
    """Runs a cell with the links of the lab limited to that rate."""
    lab.set_rate(rate)
    return run_cell(lab, experiment, report)


def _as_launched(
    benchmark: Benchmark, given: argparse.Namespace, experiments: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Every process is a worker already, on the network as it is; rank 0 also shows and stores."""
    try:
        worker = Worker(given.backend, given.device)
    except RuntimeError as error:
        fail(f"These processes cannot join one another: {error}")
    console = terminal() if worker.rank == 0 else Console(quiet=True)
    store, problem = Store({"cells": []}), None
    places = {name: place(worker.world, UNLIMITED, AS_LAUNCHED, name) for name in experiments}
    if worker.rank == 0:
        try:
            store = _open(benchmark, given)
            for name, experiment in experiments.items():
                store.find(places[name], experiment)
        except Differs as error:
            problem = str(error)
    store.resumed, problem = worker.gather((store.resumed, problem))[0]  # only rank 0 needs to see the file
    if problem:
        worker.leave()
        raise SystemExit(1) if worker.rank else Differs(problem)
    cells = []
    for number, (name, experiment) in enumerate(experiments.items(), 1):

        def measure(report: Report, experiment: Any = experiment) -> dict[str, Any]:
            return benchmark.measure(worker, asdict(experiment), report)

        title = ", ".join(filter(None, [AS_LAUNCHED, name]))
        cells.append(store.obtain(places[name], experiment, Part(number, len(experiments)), title, measure, console))
        if worker.rank == 0:
            benchmark.show(cells[-1], console)
    worker.leave()
    return cells if worker.rank == 0 else []
