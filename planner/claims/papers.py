"""Speeds and speed-ups that the papers of DeAR and ACP-SGD publish.

Networks are the lines that the authors of DeAR and ACP-SGD published for their clusters, times of one GPU those that
they published for ResNet-50 and BERT-Base; other models are taken to run at the same share of the GPU's peak.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import cache

from dear.cost_model import AlphaBeta

from .. import models
from ..codecs import EXACT, Codec, codec
from ..devices import device
from ..machine import Machine
from ..network import measured
from ..profile import Profile
from ..simulate import Method, step
from . import tuned as tuning

ETHERNET = {32: AlphaBeta(4.04e-3, 8.64e-10), 64: AlphaBeta(7.04e-3, 9.64e-10)}  # 10 Gbit/s, all-reduce
INFINIBAND = {32: AlphaBeta(4.06e-4, 4.91e-10), 64: AlphaBeta(8.06e-4, 5.89e-10)}
BATCHES = {"resnet50": 64, "densenet201": 32, "inception_v4": 64, "bert-base": 64, "bert-large": 32}
RATES = {"resnet50": 253.1, "bert-base": 212.8}  # examples a second on one GPU
PUBLISHED = (  # of 32 GPUs: network, model, every tensor by itself, merged
    ("10GbE", ETHERNET, "resnet50", 5113, 6884),
    ("100 Gb IB", INFINIBAND, "resnet50", 7327, 7876),
    ("10GbE", ETHERNET, "bert-base", 2013, 1926),
    ("100 Gb IB", INFINIBAND, "bert-base", 4099, 4940),
)
NEAR = 0.15


@cache
def profile(name: str) -> Profile:
    model = models.built_in(name)
    like = "bert-base" if name.startswith("bert") else "resnet50"
    seconds_an_operation = 1 / RATES[like] / models.built_in(like).operations
    return model.profile(BATCHES[name] * seconds_an_operation * model.operations)


@cache
def _seconds(name: str, all_reduce: AlphaBeta, workers: int, schedule: str, sent: Codec, cap: float | None) -> float:
    network = measured(workers, {"all_reduce": all_reduce})
    return step(profile(name), network, _machine(), Method(schedule, sent, cap)).seconds


@cache
def tuned(name: str, all_reduce: AlphaBeta, workers: int, schedule: str, sent: Codec = EXACT) -> float:
    """Seconds of a step."""
    return tuning.tuned(profile(name), measured(workers, {"all_reduce": all_reduce}), _machine(), schedule, sent)


def _machine() -> Machine:
    return Machine(costs=device("rtx2080ti").costs())


def throughputs() -> str:
    rows = ["| 32 GPUs | published | predicted | off by |", "|---|---|---|---|"]
    for label, lines, name, single, merged in PUBLISHED:
        alone = _seconds(name, lines[32], 32, "ddp", EXACT, 1.0)
        for way, samples, seconds in (("every tensor by itself", single, alone), ("merged", merged, None)):
            found = 32 * BATCHES[name] / (seconds or tuned(name, lines[32], 32, "ddp"))
            off = found / samples - 1
            verdict = "" if abs(off) <= NEAR else ", not reproduced"
            rows.append(f"| {name}, {label}, {way} | {samples} | {found:.0f} | {off:+.0%}{verdict} |")
    return "\n".join(rows)


def dear_gains() -> str:
    rows = ["| 64 GPUs, DeAR's speed over | 10GbE, best model | 100 Gb IB, best model |", "|---|---|---|"]
    baselines = {
        "DDP, every tensor by itself": 1.0,
        "DDP, default buckets": None,
        "DDP at its best bucket size": "tuned",
    }
    for label, cap in baselines.items():
        cells = []
        for lines in (ETHERNET, INFINIBAND):
            gains = {}
            for name in BATCHES:
                base = (
                    tuned(name, lines[64], 64, "ddp")
                    if cap == "tuned"
                    else _seconds(name, lines[64], 64, "ddp", EXACT, cap)  # type: ignore[arg-type]
                )
                gains[name] = base / min(tuned(name, lines[64], 64, way) for way in ("sharded", "replicated")) - 1
            best = max(gains, key=gains.__getitem__)
            cells.append(f"{gains[best]:+.0%} ({best}), {statistics.mean(gains.values()):+.0%} on average")
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows)


def acp_gains() -> str:
    rows = [
        "| 32 GPUs, 10GbE, ACP-SGD's speed over | ResNet-50 | BERT-Base | BERT-Large | average |",
        "|---|---|---|---|---|",
    ]
    ranks = {"resnet50": 4, "bert-base": 32, "bert-large": 32}

    def row(label: str, seconds: dict[str, float]) -> str:
        acp = {name: tuned(name, ETHERNET[32], 32, "hook", codec(f"acp:{rank}")) for name, rank in ranks.items()}
        gains = [seconds[name] / acp[name] for name in ranks]
        return f"| {label} | {' | '.join(f'{gain:.2f}×' for gain in [*gains, statistics.mean(gains)])} |"

    power = {name: tuned(name, ETHERNET[32], 32, "hook", codec(f"power:{rank}")) for name, rank in ranks.items()}
    rows.append(row("DDP, every tensor by itself", _all(ranks, "ddp", 1.0)))
    rows.append(row("DDP, default buckets", _all(ranks, "ddp", None)))
    rows.append(row("DDP at its best bucket size", {name: tuned(name, ETHERNET[32], 32, "ddp") for name in ranks}))
    rows.append(row("Power-SGD at its best bucket size", power))
    single = {
        name: _seconds(name, ETHERNET[32], 32, "hook", codec(f"power:{rank}"), 1.0) for name, rank in ranks.items()
    }
    rows.append(row("Power-SGD, every tensor by itself", single))
    return "\n".join(rows)


def _all(names: Sequence[str] | dict[str, int], schedule: str, cap: float | None) -> dict[str, float]:
    return {name: _seconds(name, ETHERNET[32], 32, schedule, EXACT, cap) for name in names}
