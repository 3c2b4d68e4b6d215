"""Options that may change with the step: a value, or a list of (step, value)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Stepwise(Generic[T]):
    """A value by step. ``values`` is ((0, first), (step, value), ...), by rising step."""

    def __init__(self, given: Any, option: str, check: Callable[[Any], T]) -> None:
        pairs = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [(0, given)]
        if not pairs or not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in pairs):
            raise ValueError(f"{option} must be a value or a list of (step, value), not {given!r}.")
        steps = [step for step, _ in pairs]
        if steps[0] != 0 or any(type(step) is not int for step in steps) or steps != sorted(set(steps)):
            raise ValueError(f"{option} must name rising steps and begin with step 0, not {given!r}.")
        self.values: tuple[tuple[int, T], ...] = tuple((step, check(value)) for step, value in pairs)

    @property
    def said(self) -> Any:
        """As options are compared and saved: the value alone where there is one."""
        return self.values[0][1] if len(self.values) == 1 else [list(pair) for pair in self.values]

    def index(self, step: int) -> int:
        """Which of the values counts in a step."""
        return max(index for index, (begin, _) in enumerate(self.values) if begin <= max(0, step))
