"""The lab: N workers on an emulated network of a chosen bandwidth, or on the loopback interface.

    with open_lab(workers=2, rate="500mbit") as lab:
        lab.run([sys.executable, "train.py"], timeout=300)       # one process per worker, told its rank as by torchrun
        lab.set_rate("250mbit")
        times = lab.call(measure, 1 << 20)                       # measure(rank, world_size, 1 << 20), results by rank

From a shell, `python -m benchmarks.netlab --workers 2 --rate 1gbit -- python train.py`.

The emulated network (see netns.py) needs root and iproute2. It sets bandwidth; it adds no latency.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext

from benchmarks.netns import DEFAULT_MTU, IFNAME, Network, NetworkUnavailable, format_rate, parse_rate
from benchmarks.ranks import RankFailed, Ranks, RanksTimedOut, Result

__all__ = ["Lab", "Loopback", "NetworkUnavailable", "RankFailed", "RanksTimedOut", "Result", "open_lab"]


class Lab(Ranks):
    """Every worker in a network namespace of its own, each port limited to `rate` both ways (None: no limit).

    rate: "500mbit", "1gbit", or bits per second; what counts is whole frames, so a TCP stream carries 95.6% of it.
    mtu: bytes per frame, headers of Ethernet excepted.

    Raises NetworkUnavailable where namespaces cannot be had, ValueError for a bad rate or number of workers.
    """

    emulated = True

    def __init__(self, workers: int, rate: str | float | None = None, mtu: int = DEFAULT_MTU) -> None:
        self._network = Network(workers, parse_rate(rate), mtu)
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

    def describe(self) -> str:
        return f"emulated network, {self.workers} workers, {format_rate(self.rate)}" + (
            " each way" if self.rate is not None else ""
        )

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
    rate: float | None = None

    def set_rate(self, rate: str | float | None) -> None:
        """Raises ValueError for anything but None."""
        if rate is not None:
            raise ValueError(f"the loopback interface cannot be limited to {rate}: leave out the rate, or use netns")

    def describe(self) -> str:
        return f"loopback, {self.workers} workers, no rate limit"

    def place(self, rank: int) -> AbstractContextManager[None]:
        return nullcontext()

    def address(self, rank: int) -> str:
        return "127.0.0.1"

    def interface(self) -> str:
        return "lo"


def open_lab(
    workers: int, rate: str | float | None = None, network: str = "netns", mtu: int = DEFAULT_MTU
) -> Lab | Loopback:
    """A lab on the network asked for.

    network: "netns" for the emulated one; "loopback"; or "auto", which takes the emulated one where it can be had and
    otherwise loopback without a limit, as `describe()` of what it returns says.

    Raises NetworkUnavailable (naming the alternative), or ValueError for a rate with "loopback".
    """
    if network not in ("netns", "loopback", "auto"):
        raise ValueError(f"there is no network {network!r}: choose netns, loopback or auto")
    parse_rate(rate)
    if network != "loopback":
        try:
            return Lab(workers, rate, mtu)
        except NetworkUnavailable:
            if network == "netns":
                raise
            rate = None
    if rate is not None:
        raise ValueError(f"the loopback interface cannot be limited to {rate}: leave out the rate, or use netns")
    return Loopback(workers)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command as every worker, its output passed through; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.netlab", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workers", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--rate", help="each port's bandwidth each way, such as 500mbit or 1gbit (default: no limit)")
    parser.add_argument("--network", choices=("netns", "loopback", "auto"), default="netns", help="(default: netns)")
    parser.add_argument("--mtu", type=int, default=DEFAULT_MTU, help=f"bytes per frame (default: {DEFAULT_MTU})")
    parser.add_argument("--timeout", type=float, help="seconds after which all workers are killed (default: never)")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="what to run, once per worker")
    options = parser.parse_args(arguments)
    try:
        with open_lab(options.workers, options.rate, options.network, options.mtu) as lab:
            print(lab.describe(), file=sys.stderr)
            lab.run(options.command, timeout=options.timeout, capture=False)
    except RankFailed as error:
        print(error, file=sys.stderr)
        return error.returncode if error.returncode > 0 else 128 - error.returncode
    except (NetworkUnavailable, RanksTimedOut, ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
