"""Inside the demo's workers: tune DDP, let it and DeAR train in rounds, then record one step of each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..progress import Report
from ..stats import best_ddp
from ..training.gpt import GPT
from ..training.measure import TRIAL_STEPS, Measurement
from ..training.plan import Plan
from ..training.strategies import parse_strategy
from ..training.timeline import STEPS, record
from ..training.trainer import optimizer_factory
from ..worker import Worker
from .tracing import AllReduceTrace, gpt_parts

CANDIDATES = ["ddp:1", "ddp:2", "ddp:4", "ddp:8", "ddp:25"]
TUNING_WARMUP, TUNING_STEPS = 1, 2
ROUND_WARMUP, ROUND_STEPS = 1, 5


@dataclass(frozen=True)
class ComparisonPlan:
    """What the workers do."""

    dear: str  # the strategy that competes with the best of CANDIDATES
    optimizer: str
    rounds: int
    seed: int = 1


def measure(worker: Worker, given: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part; rank 0's is the result: "tuning" and "training" as of training, "traces" and their failures."""
    compared = ComparisonPlan(**given)
    tuning_plan = Plan(CANDIDATES, compared.optimizer, 1, TUNING_WARMUP, TUNING_STEPS, seed=compared.seed)
    before = len(CANDIDATES) * (TRIAL_STEPS + TUNING_WARMUP + TUNING_STEPS)
    total = before + 3 * (TRIAL_STEPS + compared.rounds * (ROUND_WARMUP + ROUND_STEPS))

    trial = Measurement(worker, tuning_plan, lambda done, _, doing: report(done, total, f"tuning DDP, {doing}"))
    trial.build()
    trial.play()
    tuning = trial.finish()
    best = best_ddp(tuning["strategies"])
    if best is None:
        raise RuntimeError(f"No bucket size of DDP could be measured: {tuning['strategies'][0]['failure']}")
    plan = replace(
        tuning_plan,
        strategies=["none", best["name"], compared.dear],
        rounds=compared.rounds,
        warmup=ROUND_WARMUP,
        steps=ROUND_STEPS,
    )
    training = Measurement(worker, plan, lambda done, _, doing: report(before + done, total, f"training, {doing}"))
    training.build()
    training.play()
    training.evaluate()  # before the traces, whose steps would give DeAR more training than DDP

    if worker.rank == 0:
        report(total, total, "recording a step of each")
    group = worker.group()
    recordings: dict[str, Callable[[], dict[str, Any] | None]] = {
        best["name"]: lambda: _record_ddp(training, best["name"], group),
        compared.dear: lambda: _record_dear(training),
    }
    attempts = {name: worker.attempt(recording) for name, recording in recordings.items()}
    return {
        "tuning": tuning,
        "training": training.finish(),
        "traces": {name: trace for name, (trace, _) in attempts.items() if trace},
        "trace_failures": {name: failure for name, (_, failure) in attempts.items() if failure},
    }


def _record_dear(training: Measurement) -> dict[str, Any] | None:
    """A few more steps of DeAR; None where DeAR itself failed."""
    candidate = next(one for one in training.candidates if one.strategy.has_engine)
    trainer = candidate.running
    if trainer is None:
        return None
    net = trainer.model.module
    assert isinstance(net, GPT)
    return record(trainer, gpt_parts(net), [training.next_batch(candidate)] * STEPS, trainer.engine)


def _record_ddp(training: Measurement, name: str, group: dist.ProcessGroup) -> dict[str, Any]:
    """A few steps of a DDP built for the purpose: the one that is timed carries no hook."""
    net = training.workload.build_seeded(training.plan.seed)
    assert isinstance(net, GPT)
    trainer = parse_strategy(name).build(net, optimizer_factory(training.plan.optimizer), group)
    assert isinstance(trainer.model, DistributedDataParallel)
    tracer = AllReduceTrace(trainer.model, group)
    batch = training.next_batch(training.candidates[0])
    for _ in range(TRIAL_STEPS):
        trainer.step(*batch)
    recorded = record(trainer, gpt_parts(net), [batch] * STEPS, tracer)
    recorded["lanes"] += [tracer.wait(recorded["compute"], step) for step in range(STEPS)]
    return recorded
