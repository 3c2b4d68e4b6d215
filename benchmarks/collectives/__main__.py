"""Ways of reducing a tensor over all ranks, side by side: python -m benchmarks.collectives.

The table has the form that users of nccl-tests know: size, count, type, redop; then, out of place and in place, time,
algorithm and bus bandwidth, and wrong elements, which is a count because the sums are exactly predictable. Compressors,
whose result is not the sum, have a table of their own. Methods run in rounds at every size, so that what drifts on the
machine drifts for all of them.

    python -m benchmarks.collectives --rates 500mbit,1gbit             on the emulated network
    mpirun -n 2 python -m benchmarks.collectives -b 64K -e 16M         on the network as it is; torchrun, srun likewise

Every MPI that is found starts the workers once more, for a cell in which its all-reduce runs beside the backend's and
the ring's: a process can be started by one MPI only.
"""

import argparse
import functools
import os
from dataclasses import replace
from typing import Any

from dear.launch import detect

from .. import cells
from ..command import Parser, filled, listed, one_of, positive, size
from ..launch import WorkersFailed, run_surviving, run_workers
from ..network.lab import Lab, Loopback
from ..progress import Report
from ..worker import launched
from . import mpi
from .exact import DTYPES
from .measure import METHODS, Experiment, failed_cell, measure
from .mpi_methods import MPI_METHODS
from .show import show

CELL_SECONDS = 3600
MPI_NAMES = [one.name for one in MPI_METHODS]
RIVALS = ("all_reduce", "ring")  # run beside MPI's methods in every MPI's cell


def run_cell(lab: Lab | Loopback, experiment: Experiment, report: Report) -> dict[str, Any]:
    """Starts the workers of one cell, by an MPI where it says so; one that cannot is a cell that says why."""
    launcher = arguments().launchers[experiment.mpi] if experiment.mpi else None

    def run(experiment: Experiment) -> dict[str, Any]:
        launch = functools.partial(mpi.command, launcher, lab) if launcher else None
        return run_workers(lab, measure, experiment, report, CELL_SECONDS, launch)

    try:
        return run_surviving(experiment, experiment.methods, run)
    except WorkersFailed as error:
        if launcher is None:
            raise
        return failed_cell(experiment, lab.workers, f"{launcher.title} could not run the workers: {error}")


BENCHMARK = cells.Benchmark("collectives", measure, run_cell, show)


@functools.cache
def arguments() -> argparse.Namespace:
    """The options; `launchers` are the MPIs that were asked for and found, `missing` says why others were not."""
    parser = Parser(__package__, __doc__)
    parser.add_argument("-b", type=size, default=2**20, dest="begin", metavar="SIZE", help="smallest, such as 1M")
    parser.add_argument("-e", type=size, default=2**26, dest="end", metavar="SIZE", help="largest, such as 64M")
    parser.add_argument("-f", type=positive, default=4, dest="factor", help="from one size to the next")
    parser.add_argument("-n", type=positive, default=5, dest="iterations", help="timed runs per round")
    parser.add_argument("-w", type=positive, default=1, dest="warmup", help="untimed runs before them")
    parser.add_argument("--rounds", type=positive, default=4, help="times that every method runs at a size")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float")
    parser.add_argument(
        "--methods", type=listed(one_of(METHODS)), default=list(METHODS), help=f"of: {', '.join(METHODS)}"
    )
    parser.add_argument(
        "--mpi",
        default="openmpi,mpich",
        help="openmpi, mpich or the path of an mpirun, several with commas, or none; each starts the workers once more "
        "(default: openmpi,mpich). Not used where a launcher started this.",
    )
    cells.options(parser)
    given = parser.parse_args()
    if given.factor < 2 or given.begin > given.end:
        parser.error("-b must not exceed -e and -f must be 2 or more")
    given.sizes = [given.begin]
    while given.sizes[-1] * given.factor <= given.end:
        given.sizes.append(given.sizes[-1] * given.factor)
    given.launchers, given.missing = {}, {}
    if set(given.methods) & set(MPI_NAMES) and not launched():
        for name in [] if given.mpi == "none" else given.mpi.split(","):
            try:
                launcher = mpi.find(name.strip())
                given.launchers[launcher.title] = launcher
            except mpi.MpiUnavailable as error:
                given.missing[mpi.TITLES.get(name.strip(), name.strip())] = f"skipped: {error}"
    return given


def experiments(given: argparse.Namespace) -> dict[str, Experiment]:
    """An experiment for each way of starting the workers."""
    experiment = filled(Experiment, given, mpi="")
    if launched() and detect(os.environ).launcher == "mpirun":
        return {"": experiment}
    plain = [name for name in given.methods if name not in MPI_NAMES]
    experiments = {"": replace(experiment, methods=[*plain, *given.missing], excluded=given.missing)}
    through_mpi = [name for name in given.methods if name in (*RIVALS, *MPI_NAMES)]
    for title in given.launchers:
        experiments[title] = replace(experiment, methods=through_mpi, mpi=title)
    return {title: each for title, each in experiments.items() if each.methods}


if __name__ == "__main__":
    cells.main(BENCHMARK, arguments(), experiments(arguments()))
