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
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from . import records
from .command import fail, listed, positive, rate, terminal, worker_count
from .launch import Measure, WorkersFailed
from .network.lab import KINDS, Lab, Loopback, open_lab
from .network.namespaces import NetworkUnavailable
from .network.nodes import NodesLab
from .network.rates import UNLIMITED
from .progress import Part, Report
from .store import Differs, Store
from .store import ended_by_a_sentence as ended
from .worker import Worker, launched

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


def ended_by_a_sentence(path: Path | None) -> AbstractContextManager[None]:
    """What ends a benchmark early, an interrupt among it, is said in one sentence on stderr, and ends the program."""
    return ended(path, NetworkUnavailable, WorkersFailed)


def _open(benchmark: Benchmark, given: argparse.Namespace) -> Store:
    header = records.header(benchmark.name, {"workers": given.workers, "rates": given.rates}, given.device)
    return Store.open(header, given.json, given.resume)


def _on_a_network(
    benchmark: Benchmark, given: argparse.Namespace, experiments: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Starts the workers of every cell on the network asked for."""
    console, kept, begun = terminal(), _open(benchmark, given), time.monotonic()
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
                kept.find(where, experiment)  # what cannot be resumed is said before hours are spent on the others
            for where, experiment in todo:
                title = ", ".join(filter(None, [f"{workers} workers", where["rate"], where["variant"]]))
                measure = partial(run_at, lab, where["rate"], benchmark.run_cell, experiment)
                cell = kept.obtain(where, experiment, Part(len(cells) + 1, total), title, measure, console)
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
