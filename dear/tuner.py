"""Finds the size of the fusion groups that makes steps fastest here, while training goes on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dear._agree import agree, everyones
from dear._findings import TUNER
from dear._fusion import check_cap
from dear.engine import Engine

MOST_SKIPPED = 100  # calls in a row: a GradScaler that begins high skips far fewer
FACTORS = (0.5, 1.0, 2.0, 4.0)  # of the engine's size, where the user names no sizes


class FusionTuner:
    """Tries sizes of fusion groups, then leaves the fastest in place. Training is the same all the while.

    Every rank makes one alike and calls :meth:`step` after every ``optimizer.step()``::

        tuner = dear.FusionTuner(engine)
        for inputs, targets in data:
            loss(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.step()

    Trials of all sizes alternate, so that a slow minute of the network or the machine falls on all of them. A step is
    as slow as its slowest rank. No size is finer than DDP's own buckets, an eighth of the size ``attach`` was given (at
    least 1 MiB): groups are made of whole buckets.

    ``engine.state_dict()`` holds what was found. A tuner with the same sizes, on as many ranks, goes on with it and
    searches no more, whether it is made before ``engine.load_state_dict()`` or after.

    Args:
        engine: of ``dear.attach``, without a compressor.
        sizes: candidates in MiB; by default half, one, two and four times ``engine.bucket_cap_mb``.
        steps: timed steps of a trial, to which one is added that is not timed, since the schedule changes in it.
        rounds: trials of each size.
        clock: seconds, rising.

    Raises:
        ValueError: a size is not positive, or named twice; steps or rounds is less than 1; or ranks were given
            different ones.
        RuntimeError: the engine has a compressor, whose groups are DDP's buckets; or ``compressor="auto"``, which tunes
            the size itself.

    Source: DeAR tunes its fusion by Bayesian optimisation over 1 to 100 MiB (Zhang et al., 2023, section IV); the time
    of a step is flat around the best size, which a handful of sizes finds in fewer steps.
    """

    def __init__(
        self,
        engine: Engine,
        sizes: Sequence[float] | None = None,
        *,
        steps: int = 5,
        rounds: int = 3,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.sizes = list(sizes) if sizes is not None else [engine.bucket_cap_mb * factor for factor in FACTORS]

        def look() -> dict[str, Any]:
            _check(engine, self.sizes, steps, rounds)
            return {"sizes": self.sizes, "steps": steps, "rounds": rounds}

        agree(engine.process_group, look, "every rank must call dear.FusionTuner() with the same arguments")
        self._engine, self._steps, self._clock = engine, steps, clock
        self._times: list[list[float]] = [[] for _ in self.sizes]  # seconds, by size
        self._trials = [index for _ in range(rounds) for index in range(len(self.sizes))]
        self._seen = 0  # steps of this trial
        self._skipped = 0  # calls in a row that came while gradients waited
        self._last = 0.0  # when the step before ended
        self.best: float | None = None  #: the size in MiB that was left in place, once there is one
        self._due: float | None = None  # a size that was loaded while gradients waited for their step
        engine.bucket_cap_mb = self.sizes[self._trials[0]]
        engine._findings.add(TUNER, self)

    @property
    def tuning(self) -> bool:
        """Whether sizes are still being tried."""
        return self.best is None

    @property
    def times(self) -> dict[float, float]:
        """The median seconds of a step by size in MiB: this rank's while tuning, the slowest rank's afterwards."""
        return {size: statistics.median(own) for size, own in zip(self.sizes, self._times, strict=True) if own}

    def step(self) -> None:
        """Notes that a step has ended; changes the size after the last of a trial. Once all are done it does nothing.

        A step that was skipped, as GradScaler does, leaves gradients that no update has used: it counts for no trial.

        Raises:
            RuntimeError: gradients have waited for ``optimizer.step()`` in too many calls in a row.
        """
        if not self.tuning and self._due is None:
            return
        if self._engine._attached.scheduler.has_gradients():
            self._skipped, self._last = self._skipped + 1, self._clock()
            if self._skipped == MOST_SKIPPED:
                raise RuntimeError(
                    f"tuner.step() was called {MOST_SKIPPED} times in a row while gradients waited for "
                    "optimizer.step(): call it behind optimizer.step()."
                )
            return
        self._skipped = 0
        if not self.tuning:
            self._take_due()
            return
        now = self._clock()
        if self._seen > 0:
            self._times[self._trials[0]].append(now - self._last)
        self._seen, self._last = self._seen + 1, now
        if self._seen <= self._steps:
            return
        self._trials.pop(0)
        self._seen = 0
        if self._trials:
            self._engine.bucket_cap_mb = self.sizes[self._trials[0]]
        else:
            self._decide()

    # --- what is saved: see dear._findings ---

    def state_dict(self) -> dict[str, Any] | None:
        """What was found; None as long as sizes are tried."""
        if self.best is None:
            return None
        workers, seconds = self._engine.process_group.size(), self.times
        return {"workers": workers, "sizes": self.sizes, "seconds": [seconds[s] for s in self.sizes], "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Goes on with what was found for these sizes on as many ranks."""
        here = self._engine.process_group.size(), self.sizes
        if (state.get("workers"), state.get("sizes")) != here or state.get("best") not in self.sizes:
            return False
        self._trials = []
        self._times = [[float(seconds)] for seconds in state["seconds"]]
        self.best = self._due = state["best"]
        if not self._engine._attached.scheduler.has_gradients():
            self._take_due()
        return True

    def _take_due(self) -> None:
        if self._due is not None:
            self._engine.bucket_cap_mb, self._due = self._due, None

    def _decide(self) -> None:
        """By the slowest rank's time of each step, which all ranks then know: so all take the same size."""
        self._engine.synchronize()
        times = everyones(self._engine.process_group, self._times, "the times that the fusion tuner took")
        self._times = torch.tensor(times, dtype=torch.float64).amax(dim=0).tolist()
        medians = self.times
        self.best = min(self.sizes, key=lambda size: medians[size])
        self._engine.bucket_cap_mb = self.best


def _check(engine: Engine, sizes: list[float], steps: int, rounds: int) -> None:
    for size in sizes:
        check_cap(size)
    if not sizes or len(set(sizes)) < len(sizes):
        raise ValueError(f"sizes must be different numbers of MiB, at least one, not {sizes!r}.")
    if steps < 1 or rounds < 1:
        raise ValueError(f"steps and rounds must be at least 1, not {steps!r} and {rounds!r}.")
    if engine._steering is not None:
        raise RuntimeError(
            'compressor="auto" tunes the size of the fusion groups itself: leave the tuner out, or leave compressor '
            "out of dear.attach()."
        )
    if engine.compressor is not None:
        raise RuntimeError(
            "With a compressor the fusion groups are DDP's buckets, so they cannot be tuned while training: attach "
            "with each bucket_cap_mb in turn."
        )
