"""What the benchmark commands share: one-sentence errors, and the spelling of sizes and lists."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

from rich.console import Console

from .network.rates import parse_rate

_SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one sentence instead of a page of usage."""

    def __init__(self, package: str | None, about: str | None) -> None:
        """package: what `python -m` is given. about: a docstring, of which the first line is shown."""
        super().__init__(prog=f"python -m {package}", description=(about or "").splitlines()[0])

    def error(self, message: str) -> NoReturn:
        sentence = message[:1].upper() + message[1:].rstrip(".")
        self.exit(2, f"error: {sentence} (--help lists what is accepted).\n")


def filled(kind: type[T], given: argparse.Namespace, **more: Any) -> T:
    """A dataclass from the options of the same names; `more` is what is not an option, or differs."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{**{name: getattr(given, name) for name in names if hasattr(given, name)}, **more})


def fail(message: str) -> NoReturn:
    """Ends the command with one sentence on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(1)


def terminal() -> Console:
    """Where tables go: as wide as the terminal, or, into a file or pipe, wide enough that no column is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def rate(text: str) -> str:
    """A rate such as 500mbit or unlimited."""
    try:
        parse_rate(text.lower())
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text.lower()


def listed(kind: Callable[[str], T]) -> Callable[[str], list[T]]:
    """A comma-separated list of these, each of them once."""

    def parse(text: str) -> list[T]:
        found = [kind(part.strip()) for part in text.split(",") if part.strip()]
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} names nothing: give at least one")
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"{text!r} names something twice: name each once")
        return found

    return parse


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """One of these names."""

    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is not known: choose from {', '.join(known)}")
        return text

    return parse


def worker_count(text: str) -> int:
    """A number of workers."""
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of workers: give 2 or more, or a list such as 2,4")
    return int(text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def number(text: str, above: float = 0) -> float:
    """A finite number above that."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not above < found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above {above:g}")
    return found


def size(text: str) -> int:
    """Bytes of a size such as 1M, 64M, 4096."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text.upper())
    if found is None or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write it like 4096, 64K or 16M")
    return int(found[1]) * _SIZE_UNITS[found[2]]


def show_size(count: float) -> str:
    """Bytes for people: 4 KiB, 16 MiB, 41.6 MiB, 1020 KiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            shown = count / scale
            return f"{shown:.0f} {unit}" if shown >= 100 else f"{shown:.3g} {unit}"
    return f"{count:.0f} B"
