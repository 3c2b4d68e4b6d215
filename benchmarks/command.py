"""What the benchmark commands share: one-sentence errors, and the spelling of sizes, rates and lists."""

import argparse
import math
import re
import sys
from typing import NoReturn

from rich.console import Console

from benchmarks.netns import format_rate, parse_rate

UNLIMITED = "unlimited"
_SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one sentence instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        sentence = message[:1].upper() + message[1:].rstrip(".")
        self.exit(2, f"error: {sentence} (--help lists what is accepted).\n")


def fail(message: str) -> NoReturn:
    """Ends the command with one sentence on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def terminal() -> Console:
    """Where tables go: as wide as the terminal, or, into a file or pipe, wide enough that no column is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def rate_bits(rate: str) -> float | None:
    """Bits per second of a rate such as "500mbit" or "2.5gbit"; None for "unlimited"."""
    if rate == UNLIMITED:
        return None
    try:
        return parse_rate(rate)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}, or {UNLIMITED}") from error


def show_rate(rate: str) -> str:
    """A rate for people: 500 Mbit/s, no rate limit."""
    return format_rate(rate_bits(rate))


def rates(text: str) -> list[str]:
    """A comma-separated list of rates."""
    found = [rate.strip().lower() for rate in text.split(",") if rate.strip()]
    for rate in found:
        rate_bits(rate)
    if not found:
        raise argparse.ArgumentTypeError("no rate is given: write for example 500mbit,unlimited")
    return found


def size(text: str) -> int:
    """Bytes of a size such as 1M, 64M, 4096."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if found is None or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write it like 4096, 64K or 16M")
    return int(found[1]) * _SIZE_UNITS[found[2]]


def show_size(count: float) -> str:
    """Bytes for people: 4 KiB, 16 MiB, 41.6 MiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed_list(text: str) -> list[int]:
    """A comma-separated list of seeds, each of them once."""
    found = [positive(part.strip()) for part in text.split(",")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return found


def number(text: str, above: float = 0) -> float:
    """A finite number above that."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not above < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above {above:g}")
    return found
