"""A batch shared out among devices of unequal speed, so that all take about as long."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Sequence

from .devices import Device


def shares(examples: int, speeds: Sequence[float]) -> list[int]:
    """Whole examples for each device: no other sharing ends earlier.

    Each gets its part in proportion to its speed, rounded down; the rest goes one by one to whom it makes end first.
    """
    if not speeds or min(speeds) <= 0 or examples < 0:
        raise ValueError("A batch needs devices whose speed is above 0, and examples, 0 or more.")
    total = sum(speeds)
    found = [int(examples * speed / total) for speed in speeds]
    ends = [((own + 1) / speed, index) for index, (own, speed) in enumerate(zip(found, speeds, strict=True))]
    heapq.heapify(ends)
    for _ in range(examples - sum(found)):
        _, index = ends[0]
        found[index] += 1
        heapq.heapreplace(ends, ((found[index] + 1) / speeds[index], index))
    return found


def unevenness(examples: int, speeds: Sequence[float]) -> float:
    """How many times as long the last device computes as it would if examples could be cut."""
    own = shares(examples, speeds)
    return max(each / speed for each, speed in zip(own, speeds, strict=True)) * sum(speeds) / examples


def speeds(devices: Sequence[Device]) -> list[float]:
    """Operations a second that each sustains."""
    return [device.operations * device.sustained for device in devices]


def typical(devices: Sequence[Device]) -> Device:
    """The device of which as many train as fast together; its memory is the smallest one's, and so its bandwidth."""
    first = devices[0]
    if all(device == first for device in devices):
        return first
    names = list(dict.fromkeys(device.name for device in devices))
    return Device(
        " + ".join(names), statistics.fmean(speeds(devices)), min(device.memory for device in devices),
        min(device.bandwidth for device in devices), sustained=1.0,
    )  # fmt: skip
