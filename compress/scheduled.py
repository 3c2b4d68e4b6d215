"""Compression under the DeAR schedule: the second phase moves under the next forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from compress.compressor import Compressor
from compress.driver import Driver, not_finite
from dear import _C


class ScheduleDriver(Driver):
    """What ``dear.attach(..., compressor=...)`` puts between the scheduler and a compressor.

    The scheduler keeps the order and the waits; here are groups by bucket, and what becomes of a step in which a
    gradient was not finite. The scheduler calls :meth:`note_unused` after a backward pass where parameters may go
    unused, :meth:`judge` before anybody uses a result, and :meth:`arrived` for each bucket whose results stand.
    """

    def __init__(
        self,
        compressor: Compressor,
        model: DDP,
        device: torch.device,
        lanes: Sequence[_C.Lane],
        algorithm: str,
        scheduler: _C.Scheduler,
        synchronize: Callable[[], None],
    ) -> None:
        compressor.process_group = model.process_group
        super().__init__(compressor, device, lanes=lanes, algorithm=algorithm)
        self._names = {id(param): name for name, param in model.module.named_parameters()}
        self._scheduler, self._synchronize = scheduler, synchronize
        self._measure = compressor.take_measure()
        self._params: list[Tensor] = []
        self._judged = self.pipeline.steps  # how many steps had begun then
        self._unused: set[str] = set()
        self._to_keep: set[int] = set()  # buckets whose results for unused parameters are still to go back

    def synchronize(self) -> None:
        self._synchronize()

    def forget_groups(self) -> None:
        super().forget_groups()
        self._scheduler.forget_layout()
        self._judged = self.pipeline.steps
        self._to_keep = set()

    def measure_next(self) -> None:
        self._measure = True

    def relays(self, buckets: list[_C.Bucket], full: list[Tensor]) -> list[list[_C.Relay]]:
        """By bucket, the relays from its local gradients to its flat results."""
        self.bounds.clear()
        self._params = [param for bucket in buckets for param in bucket.params]
        relays = []
        for index, (bucket, result) in enumerate(zip(buckets, full, strict=True)):
            names = [self._names[id(param)] for param in bucket.params]
            relays.append(self.bind(index, names, bucket.params, bucket.grads, bucket.buffer.view(-1), result))
        return relays

    def note_unused(self, unused: set[torch.nn.Parameter]) -> None:
        """A backward pass has ended in which no rank has used those parameters."""
        self._unused = {self._names[id(param)] for param in unused}
        self._to_keep = set(self.bounds) if unused else set()

    def judge(self) -> None:
        """Decides, once a step, what becomes of it: waits until every rank has ended its backward pass.

        Raises:
            RuntimeError: some rank's gradient was not finite, with ``nonfinite="raise"``; the same on every rank.
        """
        step = self.pipeline.steps
        if self._judged == step:
            return
        if self._scheduler.any_dropped():
            self._scheduler.synchronize()
            self._judged = step
            self._treat_bad()
        else:
            self._compare()
            self._judged = step

    def arrived(self, index: int) -> None:
        """The bucket's results stand, in a step that was judged. Those for parameters that no rank has used, which
        nobody applies, go back to the error feedback, once."""
        if index not in self._to_keep:
            return
        self._to_keep.remove(index)
        for bound in self.bounds[index]:
            for number, member in enumerate(bound.group.members):
                error = self.compressor.feedback.errors.get(member.name)
                if member.name in self._unused and error is not None and bound.relay.compressed():
                    error.add_(bound.result(number))

    def _compare(self) -> None:
        """If that was asked for, compares this step with a dense one. Collective."""
        if self._measure:
            self._measure = False
            self._synchronize()
            for index in self.bounds:
                self.note_exact(index)
            self.compare_exact()

    def _treat_bad(self) -> None:
        """Does what ``nonfinite`` says. Everything has been exchanged."""
        every = [bound for bounds in self.bounds.values() for bound in bounds]
        bad = [bound for bound in every if bound.relay.is_bad()] or every
        if self.compressor.nonfinite == "raise":
            raise not_finite(bad[0])
        self._to_keep.clear()
        for bound in every:
            bound.relay.roll_back()
        if self.compressor.nonfinite == "skip":
            for param in self._params:
                param.grad = None
            return
        for bound in bad:
            for index in range(len(bound.begins)):
                bound.result(index).fill_(torch.nan)

    def stats_of_last_step(self) -> dict[str, Any]:
        """Of the last step that has surely finished, without waiting: what was computed, in ms."""
        return self.times(self.pipeline.counts_of_last_step)

    def release(self) -> None:
        """Gives the compressor back, with its state."""
        self.compressor.driver = None
        self.compressor.step = self.pipeline.steps
