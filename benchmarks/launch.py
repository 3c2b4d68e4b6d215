"""Starts a benchmark's workers on a lab, follows their progress, and brings back what rank 0 measured."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from . import progress
from .network.lab import Lab, Loopback
from .network.ranks import Launch, name_of, named
from .progress import Report, Step
from .worker import Worker

# A worker's part of a benchmark: itself, the experiment, how it reports; the result is rank 0's.
Measure = Callable[[Worker, dict[str, Any], Report], dict[str, Any]]


class WorkersFailed(RuntimeError):
    """The workers ended without a result. `doing` is the last thing rank 0 said it was about to do."""

    def __init__(self, reason: str, doing: str) -> None:
        super().__init__(f"The workers ended without a result while {doing or 'starting'}: {reason}")
        self.reason = reason
        self.doing = doing


def run_workers(
    lab: Lab | Loopback, measure: Measure, experiment: Any, report: Report, timeout: float, launch: Launch | None = None
) -> dict[str, Any]:
    """Runs `measure`, which must stand at the top of a module, on every worker of an open lab.

    `experiment` is a dataclass of plain values. With `launch`, it is another launcher that starts the workers. Raises
    WorkersFailed when the workers end, or are ended after `timeout` seconds, without a result.
    """
    doing = ""

    def follow(rank: int, line: str) -> None:
        nonlocal doing
        if rank == 0 and (step := progress.read(line)):
            doing = step.doing
            report(step.done, step.total, doing)

    try:
        work = name_of(measure), asdict(experiment)
        return lab.call(_work, *work, timeout=timeout, on_line=follow, launch=launch)[0]  # type: ignore[no-any-return]
    except (RuntimeError, TimeoutError, OSError) as error:
        raise WorkersFailed(_short(str(error)), doing) from error


def run_or_tell(
    lab: Lab | Loopback, measure: Measure, experiment: Any, report: Report, timeout: float
) -> dict[str, Any]:
    """As run_workers, of one candidate alone: that its workers end without a result is a result too."""
    try:
        return run_workers(lab, measure, experiment, report, timeout)
    except WorkersFailed as error:
        return {"plan": asdict(experiment), "workers": lab.workers, "failure": str(error)}


def run_surviving(experiment: Any, candidates: Sequence[str], run: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """`run(experiment)`; a candidate that takes its worker down is left out of a second try, and its row says why.

    What workers say they are doing must end in the candidate's name. `experiment` is a dataclass whose `excluded` holds
    the candidates that are left out, and why. Raises WorkersFailed where none of them is the cause.
    """
    while True:
        try:
            return run(experiment)
        except WorkersFailed as error:
            culprit = (error.doing.split() or [""])[-1]
            if culprit not in candidates or culprit in experiment.excluded:
                raise
            why = f"took its worker down while {error.doing}: {error.reason}"
            experiment = replace(experiment, excluded={**experiment.excluded, culprit: why})


def _short(text: str) -> str:
    """First and last line of a report that ends in a process's standard error: what happened, and what it said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys([lines[0], lines[-1]])) if lines else "no reason given"


def _work(rank: int, world_size: int, measure: str, experiment: dict[str, Any]) -> dict[str, Any]:
    """The other end of run_workers."""
    worker = Worker(experiment.get("backend", "gloo"), experiment.get("device", "cpu"))
    result = named(measure)(worker, experiment, lambda done, total, doing: progress.write(Step(done, total, doing)))
    worker.leave()
    return result if rank == 0 else {}
