"""How the methods are named: tried:power:0.125:q=4, tried:acp:8:pairs=2."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from . import one_message, power
from .method import Method
from .rounding import ON_THE_WIRE

METHODS: dict[str, type[Method]] = {
    "power": power.Power,
    "acp": one_message.ACP,
    "sketch": one_message.Sketch,
    "nystrom": one_message.Nystrom,
    "average": one_message.Average,
    "local": one_message.Local,
    "owner": one_message.Owner,
}
FORMS = f"tried:{'|'.join(METHODS)}:RANK[:OPTION=VALUE], RANK a whole number or a fraction of the smaller side"
#: Options of all methods, beside their own: steps that are sent exactly, bits of what stays dense, and the decay of the
#: momentum that is compressed in place of the gradient.
COMMON = {"start": 0, "vectors": 32, "momentum": 0.0}


@dataclass(frozen=True)
class Name:
    """A method with its options, not yet made: each matrix needs one of its own."""

    method: type[Method]
    rank: float  # a fraction of the smaller side where it is below 1
    options: Any
    start: int
    vectors: int
    momentum: float

    @classmethod
    def read(cls, words: Sequence[str]) -> "Name":
        """Raises ValueError or KeyError."""
        kind, rank, *more = words
        method = METHODS[kind]
        defaults: dict[str, Any] = {field.name: field.default for field in fields(method.choices)} | COMMON
        given = dict(word.split("=") for word in more)
        values = defaults | {name: type(defaults[name])(value) for name, value in given.items()}
        common = {name: values.pop(name) for name in COMMON}
        found = cls(method, float(rank), method.choices(**values), **common)
        if not found.rank > 0 or found.start < 0 or found.vectors not in ON_THE_WIRE or not 0 <= found.momentum < 1:
            raise ValueError(words)
        return found

    def rank_of(self, rows: int, columns: int) -> int:
        """Of a matrix: at least 1, at most the smaller side."""
        smaller = min(rows, columns)
        return min(smaller, int(self.rank)) if self.rank >= 1 else max(1, int(self.rank * smaller))
