"""Inside a worker: the training benchmark's rounds over methods, then what a preconditioner's step is made of."""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from ..progress import Report
from ..training.experiment import Experiment
from ..training.measure import TRIAL_STEPS, Candidate, Measurement
from ..worker import Worker
from .autoencoder import KNOWN
from .methods import parse_method

TIMED_STEPS = 10
# What a binding has, and which part of a step each method of it is. Inner ones are taken off the outer ones.
PARTS = {
    "factors": ("_capture._sink", "_capture._reduce"),
    "inversion": ("_method.solver.solve",),
    "communication": (
        "_exchanges.total", "_exchanges.average", "_exchanges.wait",
        "_ranks.mean_at_owners", "_ranks.complete", "_ranks.sum",
    ),
    "preconditioning": ("backward_ended", "begin", "precondition", "end"),
}  # fmt: skip


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
        )

    def run(self) -> dict[str, Any]:
        self.build()
        self.play()
        self.evaluate()  # before the last steps, which train on
        self._each("taking apart", self._take_apart, TIMED_STEPS)
        cell = self.finish()
        return cell | {"plan": asdict(self.experiment)}

    def _take_apart(self, candidate: Candidate) -> None:
        trainer = candidate.running
        binding = getattr(trainer, "binding", None)
        if trainer is None or binding is None or binding.preconditioner is None:
            return
        clock = Clock()
        clock.watch(binding)
        for _ in range(TIMED_STEPS):
            trainer.step(*self.next_batch(candidate))
        trainer.synchronize()
        candidate.breakdown = {name: round(clock.seconds[name] * 1e3 / TIMED_STEPS, 4) for name in PARTS}


class Clock:
    """Seconds that the methods of an object take, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # seconds of the calls inside each call under way

    def watch(self, binding: Any) -> None:
        """Times what the binding has of PARTS, for good."""
        for part, names in PARTS.items():
            for name in names:
                *path, last = name.split(".")
                owner = binding
                for step in path:
                    owner = getattr(owner, step, None)
                found = getattr(owner, last, None)
                if found is not None:
                    setattr(owner, last, self._timed(part, found))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            self._inside.append(0.0)
            try:
                return function(*args, **options)
            finally:
                took = time.perf_counter() - begun
                self.seconds[part] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        return timed
