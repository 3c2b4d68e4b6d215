"""What happens in one run: drawn from a seed."""

from __future__ import annotations

import dataclasses
import random

UPDATES = ("sharded", "owned", "replicated")
COMPRESSORS = ("acp", "power", "local", "topk", "sign", "bf16", "int8")
TWO_LEVELS = "two levels"  # sharded, in nodes of two ranks each where the world is four
MODES = (*UPDATES, TWO_LEVELS, *COMPRESSORS, *(f"{kind} hook" for kind in COMPRESSORS))
EVENTS = ("kill", "kill", "kill", "stop", "cut", "pause")
#: Where in a step a rank ends itself; "any" leaves it to a time after the step began.
PLACES = ("any", "any", "any", "forward", "backward", "before step", "after step", "checkpoint", "setup")
STEPS = 8
CHECKPOINT_EVERY = 2


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One job and what befalls it."""

    seed: int
    world: int
    mode: str
    event: str
    victim: int
    step: int
    place: str
    delay: float  # seconds after the victim's step began, where the place is "any"


def draw(seed: int, mode: str | None = None) -> Scenario:
    """The scenario of a seed; ``mode`` is drawn where none is given."""
    rng = random.Random(seed)
    world = rng.choice((2, 2, 3, 4))
    event = rng.choice(EVENTS)
    place = rng.choice(PLACES)
    if event in ("cut", "pause"):
        place = "any"  # somebody else does it
    step = rng.randrange(STEPS)
    if place == "checkpoint":
        step = rng.randrange(CHECKPOINT_EVERY - 1, STEPS, CHECKPOINT_EVERY)
    if place == "setup":
        step = 0
    drawn = rng.choice(MODES)
    return Scenario(seed, world, mode or drawn, event, rng.randrange(world), step, place, rng.uniform(0, 0.02))
