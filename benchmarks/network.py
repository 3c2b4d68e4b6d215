"""Which network a benchmark runs on: the emulated one where it can be built, else loopback, and it says which."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.command import UNLIMITED, positive, rates

AS_LAUNCHED = "as launched"  # under torchrun: whatever connects the processes
NAMESPACES = "namespaces"
LOOPBACK = "loopback"


class NetworkError(RuntimeError):
    """The network asked for cannot be had here; the message says why and what to do."""


@dataclass
class Network:
    """An open network: `lab` starts workers on it (benchmarks.netlab's Lab or Loopback)."""

    lab: Any
    name: str

    @property
    def description(self) -> str:
        if self.name == LOOPBACK:
            return "Network: loopback of this machine, no rate limit. An emulated network needs root and iproute2."
        return "Network: emulated, one namespace per worker, every port limited to the rate given."

    def possible(self, wanted: list[str]) -> list[str]:
        """The rates this network can have: loopback has one, without a limit."""
        return wanted if self.name == NAMESPACES else [UNLIMITED]

    def set_rate(self, rate: str) -> None:
        if self.name == NAMESPACES:
            self.lab.set_rate(None if rate == UNLIMITED else rate)


def network_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark on the lab takes."""
    parser.add_argument("--workers", type=_several, default=[2], help="how many, or several such as 2,4")
    parser.add_argument("--rates", type=rates, default=["1gbit"], help="such as 500mbit,1gbit,unlimited")
    parser.add_argument(
        "--network",
        choices=["auto", NAMESPACES, LOOPBACK],
        default="auto",
        help="auto: the emulated network where it can be built, else loopback",
    )


def _several(text: str) -> list[int]:
    found = [positive(part.strip()) for part in text.split(",") if part.strip()]
    if not found or 1 in found:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of workers: give 2 or more, or a list such as 2,4")
    return found


@contextmanager
def open_network(kind: str, workers: int, rate: str) -> Iterator[Network]:
    """Opens the network and tears it down. `kind` is one of the --network choices."""
    from benchmarks import netlab

    limit = None if rate == UNLIMITED else rate
    try:
        if kind == "auto":
            lab = netlab.open_lab(workers, limit)
        elif kind == LOOPBACK:
            lab = netlab.Loopback(workers)
        else:
            lab = netlab.Lab(workers=workers, rate=limit)
    except RuntimeError as error:
        raise NetworkError(str(error)) from error
    with lab:
        yield Network(lab, LOOPBACK if isinstance(lab, netlab.Loopback) else NAMESPACES)
