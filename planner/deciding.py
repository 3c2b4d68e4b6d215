"""Which ways of training a measured model on a measured network are worth a trial, by simulation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .codecs import EXACT, Codec, codec
from .machine import Machine
from .network import Network
from .profile import Profile
from .schedules import SCHEDULES
from .simulate import Method, step
from .units import MIB

PLAIN = "ddp"
#: Fusion sizes that are simulated, as shares of the model, beside fixed ones in MiB.
SHARES, SIZES = (1 / 64, 1 / 16, 1 / 4, 1.0), (1.0, 4.0, 25.0)
FINEST = 16  # groups of less than a MiB, at the most: below that DDP's own work per bucket shows


@dataclass(frozen=True)
class Way:
    """update: as :class:`dear._assembly.Setting` has it. method: a compressor's name, None for exact gradients."""

    update: str
    method: str | None = None

    @property
    def codec(self) -> Codec:
        return EXACT if self.method is None else codec(self.method)

    def __str__(self) -> str:
        if self.update == PLAIN:
            return "plain DDP"
        return f"DeAR, {self.update}" if self.method is None else f"DeAR with {self.codec.code}"


@dataclass(frozen=True)
class Predicted:
    """A way at a fusion size in MiB. seconds: of a step."""

    way: Way
    mib: float
    seconds: float


def ways(updates: Sequence[str], compressing: Sequence[str], methods: Sequence[str]) -> list[Way]:
    """updates: that can serve without a compressor. compressing: with one. methods: compressors that are allowed."""
    # Where parameters may be cut anywhere, whole ones on each rank balance no better.
    exact = [update for update in updates if update != "owned" or "sharded" not in updates]
    return [Way(update) for update in exact] + [Way(update, name) for name in methods for update in compressing]


def sizes(profile: Profile) -> list[float]:
    """Fusion sizes in MiB that are worth simulating."""
    model = profile.bytes / MIB
    found = {share * model for share in SHARES} | set(SIZES)
    return sorted(size for size in found if min(1.0, model / FINEST) <= size <= model)


def layout(profile: Profile, way: Way, mib: float) -> tuple[int, ...]:
    """Bytes of the groups in which gradients travel. Sizes with the same ones are the same setting."""
    return tuple(group.bytes for group in SCHEDULES[way.update].cut(profile, way.codec, mib * MIB))


def simulated(profile: Profile, network: Network, machine: Machine, way: Way, mib: float) -> float:
    """Seconds of a step."""
    return step(profile, network, machine, Method(way.update, way.codec, mib * MIB)).seconds


def predicted(foreseen: Callable[[Way, float], float], chosen: Sequence[Way], caps: Sequence[float]) -> list[Predicted]:
    """Each way at its best size, the fastest first. foreseen: seconds of a step, by way and size."""
    best = []
    for way in chosen:
        tried = [Predicted(way, mib, foreseen(way, mib)) for mib in caps]
        best.append(min(tried, key=lambda one: one.seconds))
    return sorted(best, key=lambda one: one.seconds)


def shortlist(found: Sequence[Predicted], begun: Way, most: int) -> list[Predicted]:
    """What is tried: the way that training began with, first; plain DDP, since nothing may be slower than it; and of
    the others the fastest."""
    first = [one for one in found if one.way == begun]
    others = [one for one in found if one.way != begun]
    plain = [one for one in others if one.way.update == PLAIN]
    rest = [one for one in others if one.way.update != PLAIN]
    return [*first, *plain, *rest][: max(most, len(first) + len(plain))]


def reason(profile: Profile, network: Network) -> str:
    """What decides: the exchange beside what may hide it."""
    whole = network.seconds("all_reduce", profile.bytes)
    return (
        f"an all-reduce of the gradients takes {1e3 * whole:.0f} ms beside {1e3 * profile.backward:.0f} ms of backward "
        f"and {1e3 * profile.forward:.0f} ms of forward"
    )
