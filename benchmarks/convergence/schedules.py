"""Learning rate schedules by name: factors of the learning rate, from the fraction of the steps that are done."""

import math
from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR

from ..training.trainer import Optimizers, listed

WARMUP = 0.05  # of the steps


def cosine(done: float) -> float:
    """A linear warm-up, then half a cosine down to 0."""
    if done < WARMUP:
        return done / WARMUP
    return (1 + math.cos(math.pi * min(1.0, (done - WARMUP) / (1 - WARMUP)))) / 2


SCHEDULES: dict[str, Callable[[float], float]] = {"constant": lambda _: 1.0, "cosine": cosine}


def schedulers(name: str, optimizers: Optimizers, steps: int) -> list[LambdaLR]:
    """One for each optimizer; to be stepped after it."""
    factor = SCHEDULES[name]
    return [LambdaLR(one, lambda step: factor((step + 1) / (steps + 1))) for one in listed(optimizers)]
