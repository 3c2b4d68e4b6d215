"""Averaged gradients in shards are preconditioned before the first update that uses them.

One number for all layers may follow from all of them (a clip of the update's size), so no group is updated before all
are reduced and preconditioned. The work itself is done as gradients come, while others are still on their way: in the
order of their reductions, which is the same in every run, and so are the sums over layers that follow from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dear._attached import Attached
from dear._context import StepContext, ordinary
from dear._layout import Segment
from dear._sharded_gradients import ShardedGradients
from dear.preconditioning import Run


class Preconditioning:
    """The preconditioner's part of a step, once for each backward pass that was reduced."""

    def __init__(self, attached: Attached, gradients: ShardedGradients) -> None:
        self._attached, self._gradients = attached, gradients
        self._pass = 0  # the last one that was preconditioned, by the scheduler's count

    def run(self, by_group: Sequence[Sequence[Segment]]) -> None:
        """Preconditions this rank's gradients, by fusion group. Collective."""
        attached, binding = self._attached, self._attached.preconditioning
        passes = attached.scheduler.passes()
        if binding.preconditioner is None or passes == self._pass or self._is_skipped():
            return
        self._pass = passes
        with ordinary(StepContext(attached.device, grad=False)):
            binding.begin()
            for group, segments in enumerate(by_group):
                attached.native.wait_reduced(group)
                binding.precondition(list(_runs(segments, attached)))
            changed = binding.end()
        self._gradients.changed_otherwise(changed)

    def _is_skipped(self) -> bool:
        """Whether the step that was called is one that GradScaler skips. It calls that of a fused optimizer all the
        same, with its verdict, which is every rank's, beside the scale where gradients are still multiplied by it.

        Raises:
            RuntimeError: they are.
        """
        optimizers = [user.optimizer for user in self._attached.users]
        for optimizer in optimizers:
            if getattr(optimizer, "grad_scale", None) is not None:
                raise RuntimeError(
                    f"{type(optimizer).__name__} is fused and divides gradients by GradScaler's scale itself, behind "
                    "the preconditioner: call scaler.unscale_(optimizer) between backward() and "
                    "scaler.step(optimizer), or leave fused=True out."
                )
        verdicts = [getattr(optimizer, "found_inf", None) for optimizer in optimizers]
        return any(bool(each) for each in verdicts if each is not None)


def _runs(segments: Sequence[Segment], attached: Attached) -> Iterator[Run]:
    for segment in segments:
        grad = segment.tensor.grad
        if grad is None or not segment.is_used(attached.unused):
            continue
        for place in segment.places:
            start, stop = max(segment.start, place.start), min(segment.stop, place.stop)
            yield Run(place.param, start - place.start, stop - place.start, segment.slot(place, grad))
