"""What is measured of a kernel, and beside what."""

from collections.abc import Callable
from dataclasses import dataclass, field


def nothing() -> None:
    """The default of what a case does before each timed call."""


@dataclass
class Case:
    """One kernel beside another way to the same end: plain torch's, unless `rival` says whose."""

    name: str
    bytes: float
    run: Callable[[], object]
    plain: Callable[[], object] | None
    prepare: Callable[[], object] = nothing
    rival: str = "plain torch"
    seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # which of the two ways, and why it was not measured
