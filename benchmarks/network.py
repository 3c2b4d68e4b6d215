"""Which network a benchmark runs on: the emulated one where it can be built, else loopback, and it says which."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.command import UNLIMITED, positive, rates
from benchmarks.netlab import Lab, Loopback, NetworkUnavailable, open_lab

AS_LAUNCHED = "as launched"  # by torchrun, mpirun or srun: whatever connects the processes
EMULATED = "netns"
LOOPBACK = "loopback"


class NetworkError(RuntimeError):
    """The network asked for cannot be had here; the message says why and what to do."""


@dataclass
class Network:
    """An open network, whose lab starts workers on it."""

    lab: Lab | Loopback

    @property
    def name(self) -> str:
        """What the tables and the JSON call it."""
        return "emulated network" if self.lab.emulated else LOOPBACK

    @property
    def description(self) -> str:
        if self.lab.emulated:
            return "Network: emulated, one namespace per worker, every port limited to the rate given."
        return "Network: loopback of this machine, no rate limit. An emulated network needs root and iproute2."

    def possible(self, wanted: list[str]) -> list[str]:
        """The rates this network can have: loopback has one, without a limit."""
        return wanted if self.lab.emulated else [UNLIMITED]

    def set_rate(self, rate: str) -> None:
        self.lab.set_rate(None if rate == UNLIMITED else rate)


def network_options(parser: argparse.ArgumentParser) -> None:
    """The options that every benchmark on the lab takes."""
    parser.add_argument("--workers", type=_several, default=[2], help="how many, or several such as 2,4")
    parser.add_argument("--rates", type=rates, default=["1gbit"], help="such as 500mbit,1gbit,unlimited")
    network_choice(parser)


def network_choice(parser: argparse.ArgumentParser) -> None:
    """The option that says which network; netns fails where it cannot be had, auto then takes loopback."""
    parser.add_argument("--network", choices=["auto", EMULATED, LOOPBACK], default="auto")


def _several(text: str) -> list[int]:
    found = [positive(part.strip()) for part in text.split(",") if part.strip()]
    if not found or 1 in found:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of workers: give 2 or more, or a list such as 2,4")
    return found


@contextmanager
def open_network(kind: str, workers: int) -> Iterator[Network]:
    """Opens the network, with no rate set, and tears it down. `kind` is one of the --network choices."""
    try:
        lab = open_lab(workers, None, kind)
    except NetworkUnavailable as error:
        sentence = str(error).rstrip(".")
        raise NetworkError(f"{sentence[:1].upper()}{sentence[1:]}.") from error
    with lab:
        yield Network(lab)
