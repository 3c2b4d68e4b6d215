"""Inside a worker: the training benchmark's rounds over methods, then what a preconditioner's step is made of."""

from dataclasses import asdict, replace
from typing import Any

from ..progress import Report
from ..training import breakdown
from ..training.experiment import Experiment
from ..training.measure import TRIAL_STEPS, Candidate, Measurement
from ..training.workloads import parts
from ..worker import Worker
from .autoencoder import KNOWN
from .clock import PARTS, Clock
from .methods import parse_method

TIMED_STEPS = 10


def measure(worker: Worker, experiment: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part of one cell."""
    return Methods(worker, Experiment(**experiment), report).run()


class Methods(Measurement):
    """One cell of this benchmark."""

    def __init__(self, worker: Worker, experiment: Experiment, report: Report) -> None:
        super().__init__(worker, replace(experiment, strategies=[], workload="digits", breakdown=False), report)
        self.experiment, self.workload = experiment, KNOWN[experiment.workload]
        self.candidates = [Candidate(parse_method(name)) for name in experiment.strategies]
        self.total = len(self.candidates) * (
            TRIAL_STEPS + experiment.rounds * (experiment.warmup + experiment.steps) + TIMED_STEPS
            + (breakdown.STEPS if experiment.breakdown else 0)
        )  # fmt: skip

    def run(self) -> dict[str, Any]:
        self.build()
        self.play()
        self.evaluate()  # before the last steps, which train on
        self._each("taking apart", self._take_apart, TIMED_STEPS)
        if self.experiment.breakdown:
            self._each("profiling", self._expose, breakdown.STEPS)
        cell = self.finish()
        return cell | {"plan": asdict(self.experiment)}

    def _take_apart(self, candidate: Candidate) -> None:
        trainer = candidate.running
        if trainer is None:
            return

        def train() -> dict[str, float]:
            with Clock() as clock:
                if (binding := getattr(trainer, "binding", None)) is not None:
                    clock.watch(binding)
                for _ in range(TIMED_STEPS):
                    trainer.step(*self.next_batch(candidate))
                trainer.synchronize()
            return clock.ms(TIMED_STEPS)

        own, candidate.failure = self.worker.attempt(train)
        everyone = self.worker.gather(own)
        if not candidate.failure:
            candidate.breakdown = {part: [one[part] for one in everyone if one] for part in PARTS}

    def _expose(self, candidate: Candidate) -> None:
        """What of communication nothing hides. Where plain DDP waits for a preconditioner besides, nobody looks."""
        trainer = candidate.running
        if trainer is None or (trainer.engine is None and getattr(trainer, "binding", None) is not None):
            return
        batches = [self.next_batch(candidate) for _ in range(breakdown.STEPS)]
        found, failure = self.worker.attempt(lambda: breakdown.profile(trainer, parts(trainer.net), batches))
        everyone = self.worker.gather(found)
        if not failure and candidate.breakdown is not None:
            candidate.breakdown["exposed"] = [_exposed(one["phases"]) for one in everyone if one]


def _exposed(phases: dict[str, float | None]) -> float:
    return sum(ms or 0.0 for name, ms in phases.items() if name.startswith("exposed_"))
