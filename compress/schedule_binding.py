"""Compression under the DeAR schedule: the second phase moves under the next forward pass."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from compress.binding import Binding
from compress.bound import Bound
from compress.contract import Contract, NonFinite
from compress.outcome import keep_unused, treat_nonfinite
from compress.two_levels import TwoLevels
from dear import _C, _ddp
from dear._agree import agree
from dear.compression import Site


class ScheduleBinding(Binding):
    """What ``dear.attach(..., compressor=...)`` puts between the scheduler and a compressor.

    The scheduler keeps the order and the waits; here are groups by bucket, and what becomes of a step in which a
    gradient was not finite. See :class:`dear.compression.Binding`.
    """

    unit = "fusion group"  # a bucket each

    def __init__(self, compressor: Contract, site: Site) -> None:
        """Collective."""
        compressor.process_group = site.model.process_group
        compressor.levels = TwoLevels.between(site.nodes, site.model)
        super().__init__(compressor, site.device, lanes=site.lanes, algorithm=site.algorithm)
        self._names = {id(param): name for param, name in _ddp.parameter_names(site.model).items()}
        self._optimizer = weakref.ref(site.optimizer)
        self._warming_up = not compressor.start.known
        self._scheduler, self._synchronize = site.scheduler, site.synchronize
        self._params: list[Tensor] = []
        self._validated = self.pipeline.steps  # how many steps had begun then
        self._unused: set[str] = set()
        self._to_keep: set[int] = set()  # buckets whose results for unused parameters are still to go back
        compressor.binding = self
        site.scheduler.set_pipeline(self.pipeline)

    def synchronize(self) -> None:
        self._synchronize()

    def finish_step(self, raises: bool = True) -> None:
        policy = self.compressor.nonfinite
        self._validate("skip" if policy == "raise" and not raises else policy)
        for bucket in tuple(self._to_keep):
            self.arrived(bucket)

    def forget_groups(self, step: int) -> None:
        super().forget_groups(step)
        self._scheduler.forget_layout()
        self._validated = step
        self._to_keep = set()
        self._warming_up = not self.compressor.start.known

    def measure_next(self) -> None:
        super().measure_next()
        self._keep_gradients()

    def _keep_gradients(self) -> None:
        """Results come in the place of gradients, to which a measured step compares them."""
        for bounds in self.bounds.values():
            for bound in bounds:
                bound.exchange.keep_gradient()

    def exchanges(self, buckets: list[_C.Bucket], full: list[Tensor]) -> list[list[_C.TwoPhaseExchange]]:
        self.bounds.clear()
        self._params = [param for bucket in buckets for param in bucket.params]
        exchanges = []
        for index, (bucket, result) in enumerate(zip(buckets, full, strict=True)):
            names = [self._names[id(param)] for param in bucket.params]
            exchanges.append(self.bind(index, names, bucket.params, bucket.grads, bucket.buffer.view(-1), result))
        if self._measure:
            self._keep_gradients()
        return exchanges

    def note_unused(self, unused: set[torch.nn.Parameter]) -> None:
        self._unused = {self._names[id(param)] for param in unused}
        self._to_keep = set(self.bounds) if unused else set()

    def validate(self) -> None:
        """Waits, once a step, until every rank has ended its backward pass. See :class:`dear.compression.Binding`."""
        self._validate(self.compressor.nonfinite)

    def _validate(self, policy: NonFinite) -> None:
        step = self.pipeline.steps
        if self._validated == step:
            return
        if self._warming_up:
            self._look_at_warmup(step)
        if self._scheduler.any_dropped():
            self._scheduler.synchronize()
            self._validated = step
            self._to_keep.clear()
            bounds = [bound for bounds in self.bounds.values() for bound in bounds]
            treat_nonfinite(policy, bounds, self._params, _spoil_results)
        else:
            self._compare()
            self._validated = step

    def _look_at_warmup(self, step: int) -> None:
        """With ``start_step="warmup"``: compression begins when the learning rate has stopped rising. Collective until
        then."""
        start, optimizer = self.compressor.start, self._optimizer()
        if optimizer is None:
            return
        ends = start.ends(optimizer.param_groups)
        remedy = "give every rank the same learning rates"
        agree(self.compressor.ranks(), lambda: {"the end of the learning rate's warm-up": ends}, remedy)
        if ends:
            start.set(step + 1)  # the step between is dense, and the codecs learn from it
            self._warming_up = False

    def arrived(self, bucket: int) -> None:
        """Results for parameters that no rank has used go back to the error feedback, once."""
        if bucket in self._to_keep:
            self._to_keep.remove(bucket)
            keep_unused(self.bounds[bucket], self._unused.__contains__, self.compressor.feedback.errors)

    def _compare(self) -> None:
        """If that was asked for, compares this step with a dense one. Collective."""
        if self._measure:
            self._measure = False
            self._synchronize()
            for index in self.bounds:
                self.note_exact(index)
            self.compare_exact()

    def stats_of_last_step(self) -> dict[str, Any]:
        return self.times(self.pipeline.counts_of_last_step)

    def release(self) -> None:
        self.compressor.initial_step, self.compressor.binding = self.steps, None


def _spoil_results(bound: Bound) -> None:
    for index in range(len(bound.begins)):
        bound.result(index).fill_(torch.nan)
