"""From what a stopwatch and an engine's trace have noted, the profile that the simulation takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .profile import Layer, Profile
from .stopwatch import Stopwatch

IN_PARTS = ("sharded", "owned")  # each rank updates its part
FORWARD = 1 / 3  # of what is computed, where no hook could tell


def measured_profile(
    watch: Stopwatch, step: float, trace: Sequence[dict[str, Any]], steps: int, update: str, workers: int
) -> Profile:
    """This rank's. step: seconds of a step, waiting included. trace: of so many steps under the strategy ``update``."""
    spans = [(each["lane"], (each["end"] - each["start"]) / 1e9 / steps) for each in trace]
    own = sum(seconds for lane, seconds in spans if lane == "update")
    waited = sum(seconds for lane, seconds in spans if lane == "wait")
    whole = own * workers if update in IN_PARTS else own
    order, forward, backward = watch.times()
    if not any(forward) or not any(backward):  # compiled code, in which no hook runs
        computed = max(step - waited - own, 0.0)
        total = sum(param.numel() for _, _, params in watch.layers for param in params)
        shares = [sum(param.numel() for param in params) / total for _, _, params in watch.layers]
        forward = [FORWARD * computed * share for share in shares]
        backward = [(1 - FORWARD) * computed * share for share in shares]
    layers = []
    for number in order:
        name, _, params = watch.layers[number]
        shapes = tuple(tuple(param.shape) for param in params)
        layers.append(Layer(name, shapes, forward[number], backward[number]))
    return Profile("the model", tuple(layers), whole)


def slowest(everyone: Sequence[Profile]) -> Profile:
    """The profile of the rank that computes longest: a step waits for it.

    Raises:
        ValueError: ranks have measured other layers, or nothing.
    """
    names = [[layer.name for layer in profile.layers] for profile in everyone]
    for rank, other in enumerate(names):
        if sorted(other) != sorted(names[0]):
            raise ValueError(f"rank {rank} has measured other layers than rank 0")
    found = max(everyone, key=lambda profile: profile.compute)
    if not 0 < found.compute < float("inf"):
        raise ValueError(f"a rank has measured {found.compute} s of computing")
    return found
