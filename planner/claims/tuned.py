"""A way of training at the bucket size that suits it best."""

from __future__ import annotations

from ..codecs import EXACT, Codec
from ..machine import Machine
from ..network import Network
from ..profile import Profile
from ..simulate import Method, step
from ..units import MIB

CAPS = tuple(MIB * size for size in (1, 4, 16, 25, 64, 128))


def tuned(profile: Profile, network: Network, machine: Machine, schedule: str, sent: Codec = EXACT) -> float:
    """Seconds of a step at the best of CAPS."""
    return min(step(profile, network, machine, Method(schedule, sent, cap)).seconds for cap in CAPS)
