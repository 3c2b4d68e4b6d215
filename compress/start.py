"""When compression begins: after a number of steps, or when the learning rate has stopped rising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dear import _C

#: While nobody knows when.
NEVER = 2**62


class Start:
    """The first compressed step of a compressor; ``native`` is what its codecs ask.

    ``"warmup"``: while the learning rate of some parameter group is higher than at the step before, the warm-up goes
    on; also while one stays at less than a scheduler's base (``"initial_lr"``) and none falls, since schedulers may be
    stepped once an epoch. The first step that ends it is followed by one more dense one, from which the codecs learn.
    """

    def __init__(self, given: Any) -> None:
        if given != "warmup" and (type(given) is not int or not 0 <= given < NEVER):
            raise ValueError(f'start_step must be the number of dense steps, 0 or more, or "warmup", not {given!r}.')
        self.given = given
        self.native = _C.StartStep(NEVER if given == "warmup" else given)
        self._rates: list[float] | None = None  # of the step before

    @property
    def known(self) -> bool:
        """Whether it is a number by now."""
        return self.native.step != NEVER

    def ends(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether a step of an optimizer with these parameter groups is the first behind the warm-up."""
        rates = [float(group["lr"]) for group in groups]
        before, self._rates = self._rates, rates
        changes = [now - then for now, then in zip(rates, before or [], strict=False)]
        if before is None or any(change > 0 for change in changes):
            return False
        falls = any(change < 0 for change in changes)
        below = any(rate < group.get("initial_lr", rate) for rate, group in zip(rates, groups, strict=True))
        return falls or not below

    def set(self, step: int) -> None:
        """Compression begins with that step."""
        self.native.step = step

    def state(self) -> dict[str, Any]:
        return {"step": self.native.step if self.known else None, "rates": self._rates}

    def load(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`state` gave, of a warm-up; a given number of steps stands."""
        if self.given == "warmup":
            self.native.step = NEVER if state["step"] is None else state["step"]
            self._rates = state["rates"]
