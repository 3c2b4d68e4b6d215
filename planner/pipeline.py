"""A model cut over its layers into stages, one for each device: which cut gives the most examples a second."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Cut:
    """ends: the layer behind the last one of each stage. seconds: of the slowest stage, for one micro-batch."""

    ends: tuple[int, ...]
    seconds: float

    def rate(self, micro_batch: int, micro_batches: int) -> float:
        """Examples a second, of a step of so many micro-batches: filling and emptying the pipeline is idle time."""
        return micro_batch * micro_batches / (self.seconds * (micro_batches + len(self.ends) - 1))


def cut(layers: Sequence[float], devices: Sequence[float], transfer: float | Sequence[float] = 0.0) -> Cut:
    """The cut whose slowest stage is fastest, by dynamic programming over layers and devices.

    layers: operations of a micro-batch, forward and backward. devices: operations a second each, in the order of the
    pipeline; a device may be left empty. transfer: seconds, of all or by device, that getting a micro-batch's
    activations and giving their gradients back takes, which overlap with computing: a stage takes as long as the
    longer of both.
    """
    if not layers or not devices or min(devices) <= 0:
        raise ValueError("A pipeline needs one layer at least, and devices whose speed is above 0.")
    transfers = [transfer] * len(devices) if isinstance(transfer, (int, float)) else list(transfer)
    if len(transfers) != len(devices):
        raise ValueError(f"transfer has {len(transfers)} times for {len(devices)} devices: give one for each.")
    total = [0.0, *accumulate(layers)]
    count = len(layers)
    best = [0.0] + [float("inf")] * count  # the slowest stage so far, by layers that are placed
    choices: list[list[int]] = []
    for speed, handing in zip(devices, transfers, strict=True):
        row, chosen = [0.0], [0]
        for end in range(1, count + 1):
            # The more layers are placed before, the slower is the slowest before, and the faster is this one.
            middle = bisect_left(range(end), True, key=lambda start: best[start] * speed >= total[end] - total[start])
            tried = [(best[end], end)]
            for start in {max(middle - 1, 0), min(middle, end - 1)}:
                tried.append((max(best[start], (total[end] - total[start]) / speed, handing), start))
            seconds, start = min(tried)
            row.append(seconds)
            chosen.append(start)
        best = row
        choices.append(chosen)
    ends, end = [], count
    for chosen in reversed(choices):
        ends.append(end)
        end = chosen[end]
    return Cut(tuple(reversed(ends)), best[count])
