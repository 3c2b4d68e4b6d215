"""A port for a process that is yet to start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

#: Below those that systems hand out themselves: such a one, free now, may be another socket's by the time that the
#: process which is told of it listens there.
FIRST, COUNT = 12000, 20000
_draw = random.SystemRandom()  # ranks, and tests, may have been seeded alike


def free_port(address: str = "") -> int:
    """One on which nobody listens at that address of this host; any that is free where none of :data:`COUNT` is.

    Raises:
        RuntimeError: no port is free.
    """
    for port in [*(FIRST + _draw.randrange(COUNT) for _ in range(100)), 0]:
        with socket.socket() as probe, suppress(OSError):
            probe.bind((address, port))
            return int(probe.getsockname()[1])
    raise RuntimeError(f"no port is free at {address or 'this host'}: close some of its sockets, or set MASTER_PORT")
