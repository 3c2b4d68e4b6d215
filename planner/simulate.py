"""A training step by simulation: what it takes, and what of it is exposed communication."""

from __future__ import annotations

from dataclasses import dataclass

from .codecs import EXACT, Codec
from .machine import Machine
from .network import Network
from .profile import Profile
from .schedules import SCHEDULES
from .worker import Worker

STEPS = 3  # simulated: the first fills the pipeline, and the ends of the last two are compared
SENDS_PARAMETERS = ("none", "fsdp2", "sharded", "owned")


@dataclass(frozen=True)
class Method:
    """A way of training. cap: bytes of a fusion group or bucket, None for its own default."""

    schedule: str
    codec: Codec = EXACT
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule!r}.")
        if self.codec is not EXACT and self.schedule in SENDS_PARAMETERS:
            raise ValueError(f"The schedule {self.schedule} sends parameters, which {self.codec.name} would spoil.")


@dataclass(frozen=True)
class Step:
    """Predicted. seconds: of a step in steady state. exposed: what it takes beyond computing. sent: bytes that a
    worker sends. events: of the simulation."""

    seconds: float
    exposed: float
    sent: float
    events: int


def step(profile: Profile, network: Network, machine: Machine, method: Method) -> Step:
    """Simulates a few steps; the time is that from one backward pass's end to the next one's."""
    worker = Worker(profile, network, machine)
    schedule = SCHEDULES[method.schedule](worker, method.codec, method.cap)
    marks = [schedule.step() for _ in range(STEPS)]
    worker.simulation.run()
    seconds = marks[-1].end - marks[-2].end
    own = profile.forward + profile.backward + profile.update * schedule.updates
    computing = own * machine.slowest(network.workers)
    sent = sum(_sent(network, method, schedule.codec.rounds(group.pieces)) for group in schedule.groups)
    return Step(seconds, seconds - computing, sent, worker.simulation.events)


def _sent(network: Network, method: Method, rounds: tuple[float, ...]) -> float:
    if method.schedule == "none":
        return 0.0
    if method.schedule == "ddp":
        return network.sent("all_reduce", sum(rounds))
    first = "all_to_all" if method.codec is not EXACT or method.schedule == "hook" else "reduce_scatter"
    return sum(network.sent(first, each) + network.sent("all_gather", each) for each in rounds)
