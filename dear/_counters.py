"""What an engine counts of its steps, in numbers that a dashboard takes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dear._attached import Attached


@dataclass(frozen=True)
class Totals:
    """Sums since the engine was made. seconds: between the ends of steps; waits: of the training thread, in ns."""

    steps: int = 0
    seconds: float = 0.0
    waited_reduce_scatter: int = 0
    waited_all_gather: int = 0
    bytes_sent: int = 0

    def since(self, before: Totals) -> Totals:
        return Totals(
            self.steps - before.steps,
            self.seconds - before.seconds,
            self.waited_reduce_scatter - before.waited_reduce_scatter,
            self.waited_all_gather - before.waited_all_gather,
            self.bytes_sent - before.bytes_sent,
        )


class Counters:
    """Counts go on where other parts take the place of those that an engine began with."""

    def __init__(self) -> None:
        self.totals = Totals()
        self.last = Totals()  # of the last step
        self._ended = 0.0  # when the last step did; 0 before there was one
        self._answered = -1  # by is_next_due(): for which pass
        self._sent_before = 0  # bytes, by parts that others have taken the place of

    def is_due(self, every: int) -> bool:
        """Whether the last step was one of so many; never of 0."""
        return every > 0 and self.totals.steps % every == 0

    def is_next_due(self, every: int, passes: int) -> bool:
        """Whether the step about to be made is; said once for each backward pass, to the optimizer that steps first."""
        due = every > 0 and (self.totals.steps + 1) % every == 0 and passes != self._answered
        if due:
            self._answered = passes
        return due

    def stepped(self, attached: Attached) -> None:
        """A step has ended."""
        before, now = self.totals, time.perf_counter()
        reduce_ns, gather_ns = attached.scheduler.take_wait_times()
        self.totals = Totals(
            before.steps + 1,
            before.seconds + (now - self._ended if self._ended else 0.0),
            before.waited_reduce_scatter + reduce_ns,
            before.waited_all_gather + gather_ns,
            self.sent(attached),
        )
        self.last, self._ended = self.totals.since(before), now

    def sent(self, attached: Attached) -> int:
        """Bytes, up to now."""
        return self._sent_before + int(attached.scheduler.bytes_sent())

    def replaced(self, attached: Attached) -> None:
        """Other parts take the place of these."""
        self._sent_before = self.sent(attached)
        self.last = Totals()

    def numbers(self, attached: Attached) -> dict[str, int | float]:
        """For :meth:`dear.Engine.stats`."""
        last = self.last
        return {
            "steps": self.totals.steps,
            "step_ms": 1e3 * last.seconds,
            "bytes_sent": self.sent(attached),
            "step_bytes_sent": last.bytes_sent,
            "exposed_ms": (last.waited_reduce_scatter + last.waited_all_gather) / 1e6,
            "wait_reduce_scatter_ms": last.waited_reduce_scatter / 1e6,
            "wait_all_gather_ms": last.waited_all_gather / 1e6,
        }
