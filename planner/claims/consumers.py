"""FusionAI's claim: are 50 RTX 3080 over consumer links worth 4 H100? With devices that fail, and spare ones."""

from __future__ import annotations

from functools import cache

from dear.cost_model import AlphaBeta

from .. import models
from ..cluster import link
from ..codecs import codec
from ..devices import device
from ..failures import Failures
from ..machine import Machine
from ..network import flat
from ..pipeline import cut
from .tuned import tuned

MODEL, SMALL, LARGE, COUNT = "bert-large", "rtx3080", "h100", 50
MICRO, MICRO_BATCHES = 8, 512  # examples of a micro-batch, and how many of them a step has
BATCH = 32  # of a worker, where training is data-parallel
TOKENS, WIDTH = 64, 1024
DAY = 86400.0
#: Of consumers' devices, assumed.
LIVES = {"a year": 365 * DAY, "30 days": 30 * DAY, "10 days": 10 * DAY, "a day": DAY}
#: Of data centers': 16,384 H100 had 419 failures in 54 days (Llama 3, 2024, table 5).
H100_LIFE = 54 * DAY * 16384 / 419
CHECKPOINT, RESTART, REPAIR = 30.0, 600.0, DAY
SPARES = (0, 1, 2, 5, 10)


def speeds() -> str:
    """A pipeline, and data-parallel training, against 4 H100 by data-parallel training."""
    rows = ["| BERT-Large, examples a second | at 1 Gbit/s | at 10 Gbit/s |", "|---|---|---|"]
    pipelines = [_pipeline(COUNT, bandwidth) for bandwidth in ("1Gbit", "10Gbit")]
    parallel = [_parallel(SMALL, COUNT, link("1ms", bandwidth)) for bandwidth in ("1Gbit", "10Gbit")]
    rows.append(_row(f"50 RTX 3080, pipeline, {MICRO_BATCHES} micro-batches", pipelines))
    rows.append(_row(f"50 RTX 3080, data-parallel, batch {BATCH}", parallel))
    rows.append(_row(f"4 H100 (PCIe), data-parallel, batch {BATCH}, 200 Gbit/s", [_four()] * 2))
    ratio = COUNT * device(SMALL).operations / (4 * device(LARGE).operations)
    return "\n".join([*rows, f"| ratio of the peaks, 50 to 4 | {ratio:.2f} | {ratio:.2f} |"])


def failing() -> str:
    """What the pipeline at 10 Gbit/s is worth in expectation, some of the 50 being spare."""
    four = Failures(H100_LIFE, CHECKPOINT, RESTART, REPAIR).useful(4) * _four()
    rows = [
        f"| one of 50 RTX 3080 fails once in | {' | '.join(f'{count} spare' for count in SPARES)} |",
        "|---" * (len(SPARES) + 1) + "|",
        f"| never | {' | '.join(_worth(_pipeline(COUNT - count, '10Gbit'), four) for count in SPARES)} |",
    ]
    for name, life in LIVES.items():
        cells = []
        for count in SPARES:
            useful = Failures(life, CHECKPOINT, RESTART, REPAIR, count).useful(COUNT - count)
            cells.append(_worth(useful * _pipeline(COUNT - count, "10Gbit"), four))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _row(name: str, rates: list[float]) -> str:
    return f"| {name} | {' | '.join(f'{rate:.0f}' for rate in rates)} |"


def _worth(rate: float, four: float) -> str:
    return f"{rate:.0f} ({rate / four:.0%})"


@cache
def _pipeline(count: int, bandwidth: str) -> float:
    on = device(SMALL)
    operations = [3 * MICRO * block.operations for block in models.built_in(MODEL).blocks]
    transfer = link("1ms", bandwidth).seconds(2 * MICRO * TOKENS * WIDTH)  # in 16 bits; gradients go the other way
    return cut(operations, [on.operations * on.sustained] * count, transfer).rate(MICRO, MICRO_BATCHES)


@cache
def _four() -> float:
    return _parallel(LARGE, 4, link("5us", "200Gbit"))


def _parallel(name: str, workers: int, between: AlphaBeta) -> float:
    on, model = device(name), models.built_in(MODEL)
    own = model.profile(BATCH * 3 * model.operations / (on.operations * on.sustained))
    return workers * BATCH / tuned(own, flat(between, workers), Machine(costs=on.costs()), "ddp", codec("fp16"))
