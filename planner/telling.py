"""The line that ``auto`` logs once it has chosen."""

from __future__ import annotations

from collections.abc import Sequence

from .deciding import PLAIN, Predicted
from .trials import NEVER, Trial


def line(
    best: Trial, begun: Trial, compared: Sequence[Trial], listed: Sequence[Predicted], steps: int, why: str
) -> str:
    """What was chosen, what it gained, and why. steps: that it took to choose."""
    plain = next((one.seconds for one in compared if one.way.update == PLAIN != best.way.update), NEVER)
    first = next((one.seconds for one in compared if one.setting == begun.setting), begun.seconds)
    rival = f", with plain DDP {_ms(plain)}" if plain < NEVER else ""
    foreseen = next((one for one in listed if one.way == best.way), None)
    said = f", {_ms(foreseen.seconds)} predicted" if foreseen is not None else ""
    start = best.way.codec.start
    said += f", once the {start:,} steps are over in which it sends more" if start else ""
    return (
        f"auto chose {best.way}, {best.mib:.3g} MiB at a time, after {steps} steps: {_ms(best.seconds)} a step measured"
        f"{said}; as it began {_ms(first)}{rival}; {why}."
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
