"""A port for a process that is yet to start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

# Below the ports that systems hand out themselves: such a one, free now, may be another socket's by the time that the
# process which is told of it listens there.
_FIRST, _COUNT = 12000, 20000
_draw = random.SystemRandom()  # not what a test may have seeded


def free_port(address: str = "127.0.0.1") -> int:
    """One on which nobody listens, and that nobody is given who asks for any."""
    for _ in range(100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((address, _FIRST + _draw.randrange(_COUNT)))
            return int(probe.getsockname()[1])
    raise OSError(f"no port of {_FIRST} to {_FIRST + _COUNT - 1} is free at {address}: close some of those sockets")
