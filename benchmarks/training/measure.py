"""Inside a worker: holds every strategy's model at once and times their steps by rounds, so that drift cancels."""

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from .. import records
from ..allocator import keep_freed_memory
from ..launch import run_surviving, run_workers
from ..network.lab import Lab, Loopback
from ..progress import Report
from ..worker import Worker, bytes_sent, user_seconds
from . import breakdown
from .data import Batch
from .experiment import Experiment
from .strategies import Strategy, parse_strategy
from .trainer import Trainer, optimizer_factory
from .workloads import WORKLOADS, MissingPackage, parts

TRIAL_STEPS = 3  # DDP rebuilds its buckets in the second step and torch's PowerSGD starts in the third
TRACED_STEPS = 3
HELD_OUT_BATCH = 32
SECONDS_PER_STEP = 20  # far more than any step takes: a cell that needs longer is stuck


def run_cell(
    lab: Lab | Loopback, experiment: Experiment, report: Report, work: Callable[..., dict[str, Any]] | None = None
) -> dict[str, Any]:
    """One cell; a strategy that takes its worker down is left out of a second try, and its row says why.

    work: a worker's part, :func:`measure` unless another benchmark has its own.
    """
    steps = len(experiment.strategies) * (experiment.rounds * (experiment.warmup + experiment.steps) + 15)
    limit = 60 + SECONDS_PER_STEP * steps
    return run_surviving(
        experiment,
        experiment.strategies,
        lambda experiment: run_workers(lab, work or measure, experiment, report, timeout=limit),
    )


def measure(worker: Worker, experiment: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part of one cell."""
    return Measurement(worker, Experiment(**experiment), report).run()


@dataclass
class Candidate:
    """A strategy, its trainer while it lives, and everything measured of it."""

    strategy: Strategy
    trainer: Trainer | None = None
    failure: str | None = None
    payload_bytes_per_step: int = 0
    blocks: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # this rank's, every step from the first
    clock: list[float] = field(default_factory=list)  # ms each of these steps took on this rank
    held_out_loss: float | None = None
    optimizer_state_bytes: list[int] = field(default_factory=list)
    chosen: dict[str, Any] | None = None  # what a strategy that chooses by itself has come to
    breakdown: dict[str, Any] | None = None  # this rank's

    @property
    def trial_steps(self) -> int:
        """Steps behind building it, of no round."""
        return TRIAL_STEPS + self.strategy.settles

    @property
    def running(self) -> Trainer | None:
        """The trainer, unless it failed. A failed one is kept but never touched: its shutdown may block."""
        return None if self.failure else self.trainer


class Measurement:
    """One cell. Every rank makes the same calls in the same order."""

    def __init__(self, worker: Worker, experiment: Experiment, report: Report) -> None:
        self.worker, self.experiment, self.report = worker, experiment, report
        self.freed_memory_kept = keep_freed_memory()
        self.workload = WORKLOADS[experiment.workload]
        self.candidates = [Candidate(parse_strategy(name)) for name in experiment.strategies]
        profiled = breakdown.STEPS if experiment.breakdown else 0
        self.total = len(self.candidates) * (experiment.rounds * (experiment.warmup + experiment.steps) + profiled)
        self.total += sum(candidate.trial_steps for candidate in self.candidates)
        self.done = 0
        self.digest: str | None = None
        self.same: Batch | None = None  # the last one drawn, on this rank's device

    def run(self) -> dict[str, Any]:
        """Everything, in order."""
        self.build()
        self.play()
        self.evaluate()  # before the profile, whose steps train on
        if self.experiment.breakdown:
            self._each("profiling", self._profile, breakdown.STEPS)
        if self.experiment.traces:
            self._each("tracing", self._trace)
        return self.finish()

    def build(self) -> None:
        """Builds every strategy and tries it."""
        for candidate in self.candidates:
            self._one("building", self._build, candidate, candidate.trial_steps)

    def play(self) -> None:
        """All rounds: each strategy in turn, the order rotated from round to round."""
        for number in range(self.experiment.rounds):
            first = number % len(self.candidates)
            for candidate in self.candidates[first:] + self.candidates[:first]:
                self._block(candidate, number)
                name = candidate.strategy.name
                self._progress(
                    self.experiment.warmup + self.experiment.steps,
                    f"round {number + 1} of {self.experiment.rounds}: {name}",
                )

    def evaluate(self) -> None:
        """Held-out loss and optimizer memory of every strategy."""
        self._each("evaluating", self._evaluate)

    def finish(self) -> dict[str, Any]:
        """Closes every strategy; returns all that was measured."""
        for candidate in self.candidates:
            if (trainer := candidate.running) is not None:
                candidate.chosen = trainer.plan
                _, candidate.failure = self.worker.attempt(trainer.close)
                candidate.trainer = None
        with suppress(MissingPackage):
            self.digest = self.workload.data().digest
        return {
            "plan": asdict(self.experiment),
            "workers": self.worker.world,
            "cpus": records.cpus(),
            "congestion_control": records.congestion_control(),
            "freed_memory_kept": self.freed_memory_kept,
            "about": self.workload.about,
            "data": self.digest,
            "strategies": [self._account(candidate) for candidate in self.candidates],
        }

    def _progress(self, steps: int, doing: str) -> None:
        self.done += steps
        if self.worker.rank == 0:
            self.report(self.done, self.total, doing)

    def _each(self, doing: str, action: Callable[[Candidate], None], steps: int = 0) -> None:
        for candidate in self.candidates:
            self._one(doing, action, candidate, steps)

    def _one(self, doing: str, action: Callable[[Candidate], None], candidate: Candidate, steps: int) -> None:
        what = f"{doing} {candidate.strategy.name}"
        self._progress(0, what)
        action(candidate)
        self._progress(steps, what)

    def _build(self, candidate: Candidate) -> None:
        candidate.failure = self.experiment.excluded.get(candidate.strategy.name)
        if candidate.failure:
            return
        group = self.worker.group()
        sent: list[int] = []  # by the last two trial steps: ACP-SGD sends two factors of different length in turn

        def build_and_try() -> Trainer:
            net = self.workload.build_seeded(self.experiment.seed).to(self.worker.device)
            candidate.payload_bytes_per_step = candidate.strategy.payload_bytes(net, self.worker.world)
            trainer = candidate.strategy.build(net, optimizer_factory(self.experiment.optimizer), group)
            trainer.loss = self.workload.loss
            for number in range(candidate.trial_steps):
                self.step(candidate, trainer)
                if trainer.compressor is not None and number >= candidate.trial_steps - 2:
                    self._drain(candidate, trainer)
                    sent.append(trainer.compressor_stats()["bytes_sent"])
            self._drain(candidate, trainer)
            return trainer

        candidate.trainer, candidate.failure = self.worker.attempt(build_and_try)
        if sent:
            candidate.payload_bytes_per_step = sum(sent) // len(sent)

    def next_batch(self, candidate: Candidate) -> Batch:
        """What the candidate trains on next: the same examples in the same order for every one of them."""
        data, worker = self.workload.data(), self.worker
        if self.same is None or data.varies:
            where = {
                "rank": worker.rank,
                "world": worker.world,
                "batch": self.experiment.batch,
                "seed": self.experiment.seed,
            }
            inputs, targets = data.batch(len(candidate.losses), **where)
            self.same = inputs.to(worker.device), targets.to(worker.device)
        return self.same

    def step(self, candidate: Candidate, trainer: Trainer) -> None:
        start = time.perf_counter()
        candidate.losses.append(trainer.step(*self.next_batch(candidate)))
        candidate.clock.append((time.perf_counter() - start) * 1e3)

    def _drain(self, candidate: Candidate, trainer: Trainer) -> None:
        """Waits for what is in flight, on the last step's account: else its cost would be in no step."""
        start = time.perf_counter()
        trainer.synchronize()
        self.worker.synchronize()
        candidate.clock[-1] += (time.perf_counter() - start) * 1e3

    def _block(self, candidate: Candidate, number: int) -> None:
        """Warm-up steps, then timed ones. DeAR's last gather belongs to the block's end, its first to a warm-up step.

        So each timed step is a steady-state one: it pays for exactly one reduce-scatter and one all-gather.
        """
        trainer = candidate.running
        if trainer is None:
            return
        self.worker.barrier()
        measured, failure = self.worker.attempt(lambda: self._timed_steps(candidate, trainer))
        if failure:
            candidate.failure = f"round {number + 1}: {failure}"
            return
        ranks = [one for one in self.worker.gather(measured) if one]
        candidate.blocks.append({"round": number, **{key: [one[key] for one in ranks] for key in ranks[0]}})

    def _timed_steps(self, candidate: Candidate, trainer: Trainer) -> dict[str, Any]:
        for _ in range(self.experiment.warmup):
            self.step(candidate, trainer)
        sent, cpu, user = bytes_sent(), time.process_time(), user_seconds()
        marks = [time.perf_counter()]
        for _ in range(self.experiment.steps):
            self.step(candidate, trainer)
            marks.append(time.perf_counter())
        # Before the drain: the first timed step sent what the last warm-up step had left, and so it is with the last.
        cpu_ms, sent_after = (time.process_time() - cpu) * 1e3, bytes_sent()
        user_after = user_seconds()
        engine = trainer.stats()
        self._drain(candidate, trainer)
        return {
            "ms": [round((end - start) * 1e3, 3) for start, end in pairwise(marks)],
            "cpu_ms_per_step": round(cpu_ms / self.experiment.steps, 3),
            "sent_bytes_per_step": None if sent is None else ((sent_after or 0) - sent) // self.experiment.steps,
            "engine": engine,
            "compressor": trainer.compressor_stats(),
            # User-mode CPU seconds of the block: the machine's, this worker's. What is left over, others have taken.
            "user_s": [round(b - a, 2) for a, b in zip(user, user_after, strict=True)] if user and user_after else None,
        }

    def _evaluate(self, candidate: Candidate) -> None:
        trainer = candidate.running
        if trainer is None:
            return
        held_out = self.workload.data().held_out(HELD_OUT_BATCH)

        def evaluate() -> tuple[float | None, int]:
            trainer.synchronize()
            loss = trainer.evaluate(*(each.to(self.worker.device) for each in held_out)) if held_out else None
            return loss, trainer.optimizer_state_bytes()

        result, failure = self.worker.attempt(evaluate)
        if failure or result is None:
            candidate.failure = f"at the end: {failure}"
            return
        candidate.held_out_loss = result[0]
        candidate.optimizer_state_bytes = self.worker.gather(result[1])

    def _profile(self, candidate: Candidate) -> None:
        trainer = candidate.running
        if trainer is None:
            return
        batches = [self.next_batch(candidate)] * breakdown.STEPS
        profile = partial(breakdown.profile, trainer, parts(trainer.net), batches)
        candidate.breakdown, failure = self.worker.attempt(profile)
        if failure:
            candidate.breakdown = {"failure": failure}

    def _trace(self, candidate: Candidate) -> None:
        """Rank 0 writes what host and device did in a few steps, for chrome://tracing or ui.perfetto.dev."""
        trainer = candidate.running
        if trainer is None:
            return
        batch = self.next_batch(candidate)

        def steps() -> None:
            trainer.step(*batch)  # fills the pipeline
            profiler = torch.profiler.profile() if self.worker.rank == 0 else None
            with profiler or nullcontext():
                for _ in range(TRACED_STEPS):
                    trainer.step(*batch)
                trainer.synchronize()
                self.worker.synchronize()
            if profiler is not None:
                name = candidate.strategy.name.replace(":", "-")
                Path(self.experiment.traces).mkdir(parents=True, exist_ok=True)
                profiler.export_chrome_trace(f"{self.experiment.traces}/{name}.json.gz")

        _, candidate.failure = self.worker.attempt(steps)

    def _account(self, candidate: Candidate) -> dict[str, Any]:
        losses = [sum(step) / len(step) for step in zip(*self.worker.gather(candidate.losses), strict=False)]
        clock = [max(step) for step in zip(*self.worker.gather(candidate.clock), strict=False)]
        return {
            "name": candidate.strategy.name,
            "failure": candidate.failure,
            "payload_bytes_per_step": candidate.payload_bytes_per_step,
            "held_out_loss": candidate.held_out_loss,
            "optimizer_state_bytes": candidate.optimizer_state_bytes,
            "chosen": candidate.chosen,
            "blocks": candidate.blocks,
            "breakdown": candidate.breakdown,
            "losses": [round(loss, 6) for loss in losses],  # training loss, mean over ranks, every step
            "clock_ms": [round(ms, 3) for ms in clock],  # what each of them took, trial and warm-up steps included
        }
