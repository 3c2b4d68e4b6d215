"""The lab: N workers on an emulated network of a chosen bandwidth, or on the loopback interface.

    with open_lab(workers=2, rate="500mbit") as lab:
        lab.run([sys.executable, "train.py"], timeout=300)       # one process per worker, told its rank as by torchrun
        lab.set_rate("250mbit")
        times = lab.call(measure, 1 << 20)                       # measure(rank, world_size, 1 << 20), results by rank

The emulated network (see namespaces.py) needs root and iproute2. It sets bandwidth; it adds no latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from .namespaces import IFNAME, Network, NetworkUnavailable
from .ranks import Ranks
from .rates import UNLIMITED, parse_rate, show_rate

KINDS = ("auto", "netns", "loopback")  # auto: the emulated network where it can be had, else loopback


class Lab(Ranks):
    """Every worker in a network namespace of its own, each port limited to `rate` both ways (None: no limit).

    rate: "500mbit", "1gbit", or bits per second; what counts is whole frames of 1514 bytes, of which 1448 are payload,
    so a TCP stream carries 95.6% of it.

    Raises NetworkUnavailable where namespaces cannot be had, ValueError for a bad rate or number of workers.
    """

    emulated = True
    name = "emulated network"  # in tables and JSON
    node_size = 1  # workers in a namespace
    about = "Network: emulated, one namespace per worker, every port limited to the rate given."

    def __init__(self, workers: int, rate: str | float | None = None, hosts: int | None = None) -> None:
        self._network = Network(workers if hosts is None else hosts, parse_rate(rate))
        try:
            super().__init__(workers)
        except BaseException:
            self._network.close()
            raise

    @property
    def rate(self) -> float | None:
        """Bits per second each way, or None."""
        return self._network.rate

    def set_rate(self, rate: str | float | None) -> None:
        """Changes the rate of every port, also while workers run."""
        self._network.set_rate(parse_rate(rate))

    def possible(self, rates: Sequence[str]) -> Sequence[str]:
        """Of these rates, those that this network can have."""
        return rates

    def place(self, rank: int) -> AbstractContextManager[None]:
        return self._network.hosts[rank].inside()

    def address(self, rank: int) -> str:
        return self._network.address(rank)

    def interface(self) -> str:
        return IFNAME

    def namespaces(self) -> list[str]:
        """The path of each rank's network namespace, which stands as long as the lab does."""
        return [host.path for host in self._network.hosts]

    def close(self) -> None:
        super().close()
        self._network.close()


class Loopback(Ranks):
    """The same workers on the loopback interface: no rights needed, no rate limit to be had."""

    emulated = False
    name = "loopback"
    node_size = 1
    about = "Network: loopback of this machine, no rate limit. An emulated network needs root and iproute2."
    rate: float | None = None

    def set_rate(self, rate: str | float | None) -> None:
        """Raises ValueError for anything but no limit."""
        if parse_rate(rate) is not None:
            raise ValueError(f"the loopback interface cannot be limited to {rate}: leave out the rate, or use netns")

    def possible(self, rates: Sequence[str]) -> Sequence[str]:
        """Loopback has one rate: no limit."""
        return [UNLIMITED]

    def place(self, rank: int) -> AbstractContextManager[None]:
        return nullcontext()

    def address(self, rank: int) -> str:
        return "127.0.0.1"

    def interface(self) -> str:
        return "lo"


def describe(lab: Lab | Loopback) -> str:
    """What the lab is, in one line."""
    return f"{lab.name}, {lab.workers} workers, {show_rate(lab.rate)}{'' if lab.rate is None else ' each way'}"


def open_lab(workers: int, rate: str | float | None = None, network: str = "netns") -> Lab | Loopback:
    """A lab on the network asked for, one of KINDS; "auto" may take loopback, which then has no rate limit.

    Raises NetworkUnavailable (naming the alternative), or ValueError for a rate with "loopback".
    """
    if network not in KINDS:
        raise ValueError(f"there is no network {network!r}: choose from {', '.join(KINDS)}")
    parse_rate(rate)
    if network != "loopback":
        try:
            return Lab(workers, rate)
        except NetworkUnavailable:
            if network == "netns":
                raise
            rate = None
    lab = Loopback(workers)
    try:
        lab.set_rate(rate)
    except ValueError:
        lab.close()
        raise
    return lab
