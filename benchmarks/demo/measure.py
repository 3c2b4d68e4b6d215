"""Inside the demo's workers: tune DDP, let it and DeAR train in rounds, then record one step of each."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from ..progress import Report
from ..stats import FLOOR, best_ddp
from ..training.breakdown import ProfilerTrace
from ..training.experiment import Experiment
from ..training.gpt import GPT
from ..training.measure import TRIAL_STEPS, Measurement
from ..training.timeline import STEPS, record
from ..worker import Worker

CANDIDATES = ["ddp:1", "ddp:2", "ddp:4", "ddp:8", "ddp:25"]
TUNING_WARMUP, TUNING_STEPS = 1, 2
ROUND_WARMUP, ROUND_STEPS = 1, 5


@dataclass(frozen=True)
class Comparison:
    """What the workers do."""

    dear: str  # the strategy that competes with the best of CANDIDATES
    optimizer: str
    rounds: int
    seed: int = 1


def measure(worker: Worker, given: dict[str, Any], report: Report) -> dict[str, Any]:
    """A worker's part; rank 0's is the result: "tuning" and "training" as of training, "traces" and their failures."""
    compared = Comparison(**given)
    tuning = Experiment(CANDIDATES, compared.optimizer, 1, TUNING_WARMUP, TUNING_STEPS, seed=compared.seed)
    before = len(CANDIDATES) * (TRIAL_STEPS + TUNING_WARMUP + TUNING_STEPS)
    total = before + 3 * (TRIAL_STEPS + compared.rounds * (ROUND_WARMUP + ROUND_STEPS))

    trial = Measurement(worker, tuning, lambda done, _, doing: report(done, total, f"tuning DDP, {doing}"))
    trial.build()
    trial.play()
    tuned = trial.finish()
    best = best_ddp(tuned["strategies"])
    if best is None:
        raise RuntimeError(f"No bucket size of DDP could be measured: {tuned['strategies'][0]['failure']}")
    experiment = replace(
        tuning,
        strategies=[FLOOR, best["name"], compared.dear],
        rounds=compared.rounds,
        warmup=ROUND_WARMUP,
        steps=ROUND_STEPS,
    )
    training = Measurement(
        worker, experiment, lambda done, _, doing: report(before + done, total, f"training, {doing}")
    )
    training.build()
    training.play()
    training.evaluate()  # before the traces, whose steps would give DeAR more training than DDP

    if worker.rank == 0:
        report(total, total, "recording a step of each")
    attempts = {name: worker.attempt(partial(_record, training, name)) for name in (best["name"], compared.dear)}
    return {
        "tuning": tuned,
        "training": training.finish(),
        "traces": {name: trace for name, (trace, _) in attempts.items() if trace},
        "trace_failures": {name: failure for name, (_, failure) in attempts.items() if failure},
    }


def gpt_parts(net: GPT) -> list[tuple[str, nn.Module]]:
    """The parts that the pictures show."""
    blocks = [(f"block {number}", block) for number, block in enumerate(net.blocks, start=1)]
    return [("embedding", net.bytes), *blocks, ("head", net.norm)]


def _record(training: Measurement, name: str) -> dict[str, Any] | None:
    """A few more steps of a strategy, in lanes by what moves; None where it failed."""
    candidate = next(one for one in training.candidates if one.strategy.name == name)
    trainer = candidate.running
    if trainer is None:
        return None
    net = trainer.net
    assert isinstance(net, GPT)
    tracer = ProfilerTrace() if trainer.engine is None else trainer.engine
    recorded = record(trainer, gpt_parts(net), [training.next_batch(candidate)] * STEPS, tracer)
    for span in recorded["lanes"]:
        span["lane"] = span["name"] if span["lane"] == "communication" else span["lane"]
    return recorded
