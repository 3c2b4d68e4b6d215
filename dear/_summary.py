"""A line in the log every so many steps: what a step takes, what of it is exposed communication, who is slowest."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

from dear import _C
from dear._agree import agree
from dear._attached import Attached
from dear._counters import Counters, Totals

log = logging.getLogger("dear")


class Summary:
    """Says on rank 0 what steps took on all ranks, once :meth:`set_every` has told how often.

    Each rank's numbers go round behind the last step's all-gathers, and are read a step later: nobody waits for them.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters, self._every = counters, 0
        self._before = counters.totals
        self._moving: tuple[_C.Exchange, torch.Tensor, int] | None = None  # every rank's numbers, and this rank

    def set_every(self, group: dist.ProcessGroup, steps: int) -> None:
        """See :meth:`dear.Engine.log_every`. Collective."""

        def look() -> dict[str, Any]:
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
                raise ValueError(f"steps of log_every() must be a whole number, 0 or more, not {steps!r}.")
            return {"steps of log_every()": steps}

        agree(group, look, "give every rank the same number")
        self.finish()
        self._every, self._before = steps, self._counters.totals

    def stepped(self, attached: Attached) -> None:
        """A step has ended. Collective every so many steps."""
        if not self._every:
            return
        self.finish()
        if self._counters.is_due(self._every):
            own, self._before = self._counters.totals.since(self._before), self._counters.totals
            self._send(attached, own)

    def _send(self, attached: Attached, own: Totals) -> None:
        steps = max(own.steps, 1)
        mine = [own.seconds, own.waited_reduce_scatter / 1e9, own.waited_all_gather / 1e9, own.bytes_sent]
        full = torch.zeros((attached.world, len(mine)), device=attached.device)
        full[attached.rank] = torch.tensor(mine) / steps
        flat = full.view(-1)
        part = flat[attached.rank * len(mine) : (attached.rank + 1) * len(mine)]
        exchange = attached.gather_lane.submit(
            _C.Phase.all_gather, _C.Reduction.sum, [(flat, part)], "the summary of the steps"
        )
        self._moving = exchange, full, attached.rank

    def finish(self) -> None:
        """Says what went round, once."""
        if self._moving is None:
            return
        (exchange, full, rank), self._moving = self._moving, None
        exchange.wait()
        if rank == 0:
            log.info(sentence(self._before.steps, self._every, full.tolist(), full.device.type == "cpu"))


def sentence(step: int, every: int, ranks: list[list[float]], waits: bool) -> str:
    """ranks: seconds, waits for both phases in seconds, and bytes of a step. waits: whether they show who is slow."""
    seconds = max(own[0] for own in ranks)
    reduce, gather = (max(own[phase] for own in ranks) for phase in (1, 2))
    said = (
        f"Step {step}: {1e3 * seconds:.3g} ms a step over {every}, of which up to {1e3 * reduce:.3g} ms waited for "
        f"reduce-scatters and {1e3 * gather:.3g} ms for all-gathers; {max(own[3] for own in ranks) / 1e6:.3g} MB sent"
    )
    if not waits:  # streams wait in the host's place
        return said + "."
    computed = [own[0] - own[1] - own[2] for own in ranks]
    slowest = max(range(len(ranks)), key=lambda rank: computed[rank])
    return f"{said}; the slowest rank is {slowest}, with {1e3 * computed[slowest]:.3g} ms besides."
