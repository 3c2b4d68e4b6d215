"""What one run of the machine is: a model, an optimizer, options, and a program."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

#: How the library is put under the model. "compressed" and "register" use a compressor that stays dense. There is
#: "owned", too, with an optimizer that wants parameters whole, "auto", which leaves the choice to the library,
#: "switching", which takes another setting in every step, and preconditioners, which plain DDP has, too.
HOWS = ("sharded", "replicated", "compressed", "register")
ALL_HOWS = (*HOWS, "owned", "auto", "switching", "eva", "kfac")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a program. ``label`` says what kind of use it is; plain training has the label ``""``."""

    code: str
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One program and what it runs on. Everything in it can be printed and pickled."""

    how: str
    model: str = "Mlp"
    optimizer: tuple[str, dict[str, Any]] = ("SGD", {"lr": 0.05})
    groups: int = 1  # parameter groups of the optimizer; 0: one, without the model's last parameter
    #: Another optimizer. Each has a half of the parameters; with groups=2 each has every other one of them.
    second: tuple[str, dict[str, Any]] | None = None
    workers: int = 2
    ddp: dict[str, Any] = dataclasses.field(default_factory=dict)
    attach: dict[str, Any] = dataclasses.field(default_factory=dict)
    program: tuple[Piece, ...] = ()
    delay: float = 0.002  # seconds that late() holds a rank back

    @property
    def labels(self) -> frozenset[str]:
        """What kinds of use the program makes of the API, plain training left out."""
        return frozenset(piece.label for piece in self.program if piece.label)

    def with_program(self, pieces: Any) -> Case:
        """The same with another program."""
        return dataclasses.replace(self, program=tuple(pieces))

    def script(self) -> str:
        """A script that runs this case alone and prints the verdict."""
        options = "".join(
            f"    {field.name}={getattr(self, field.name)!r},\n"
            for field in dataclasses.fields(self)
            if field.name not in ("program", "delay") and getattr(self, field.name) != _default(field)
        )
        body = "\n".join(piece.code for piece in self.program)
        return (
            f"from machine.replay import replay  # PYTHONPATH=tests:.\n\nreplay(\n{options}"
            f'    program="""\n{body}\n""",\n)\n'
        )


def _default(field: Any) -> Any:
    return (
        field.default_factory()
        if field.default is dataclasses.MISSING and callable(field.default_factory)
        else field.default
    )


class Result(NamedTuple):
    """What became of a case on one rank."""

    kind: str
    piece: int  # at which it ended
    text: str = ""
    where: str = ""  # an error was raised
    values: tuple[str, ...] = ()  # digests of plain DDP's parameters before and after the piece of an error
    #: Of each value noted, where it may be rounded otherwise: its piece, digests of plain DDP's and of the library's.
    notes: tuple[tuple[int, str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case on all ranks together.

    kind: "equal"; "refused" (one clear error); "invalid" (plain DDP itself fails at the first piece); or a failure:
        "difference", "unclear error", "misleading error", "one-sided error", "false error" (replicas that plain DDP
        keeps equal are said to differ), "hang", "crash".
    """

    kind: str
    text: str = ""
    at: str = ""  # the piece at which it showed

    @property
    def failed(self) -> bool:
        """Whether the promise is broken."""
        return self.kind not in ("equal", "refused", "invalid")
