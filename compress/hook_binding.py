"""Compression as a plain DDP hook, natively: names, groups, and what a backward pass that needs attention gets."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from compress.binding import Binding
from compress.bound import Bound
from compress.choices import check_matched
from compress.contract import Contract
from compress.outcome import keep_unused, treat_nonfinite
from dear import _C, _ddp
from dear._compiled import enter, leave, uncompiled
from dear._first_pass import Watch, check_begins, check_learns
from dear._look_again import Facts
from dear._own_calls import OwnCalls
from dear._standing import lies_in


class HookBinding(Binding):
    """What :func:`compress.register` and :func:`compress.comm_hook` put between DDP and a compressor.

    Without a model, parameters are named as Note [What a hook sees of the model] in :mod:`compress.comm_hook` says.
    """

    calls: _C.HookCalls | None = None  # of the native hook, counted
    _names_checked = False
    _laid = False  # DDP's buckets, for good
    _begun = 0  # steps, before this model's first

    def __init__(self, compressor: Contract, device: torch.device, model: DDP | None = None) -> None:
        """Collective."""
        if not compressor.start.known:
            raise ValueError(
                'start_step="warmup" needs the optimizer, which only dear.attach() knows: give a number of steps.'
            )
        super().__init__(compressor, device)
        self._model = model
        self._learns_graph = False  # a static one, in the first pass
        self._names: dict[int, str] = {}
        self._params: dict[str, Tensor] = {}
        self._slots: dict[str, Tensor] = {}  # in DDP's buckets, by name
        me = weakref.ref(self)  # the model's reducer holds the native hook, which must not hold the model

        @uncompiled
        def bind(index: int, bucket: _C.Bucket) -> list[_C.TwoPhaseExchange]:
            return _alive(me)._bind(index, bucket)

        @uncompiled
        def measure(index: int) -> None:
            _alive(me).note_exact(index)

        @uncompiled
        def ended(nonfinite: Sequence[int]) -> None:
            _alive(me)._ended(bool(nonfinite))

        self.native = _C.CompressedHook(self.pipeline, bind, measure, ended)
        if self._measure:
            self.native.measure_next()

    def register(self) -> None:
        """Makes this the communication hook of the model."""
        model = self._model
        assert model is not None
        self._names = {id(param): name for param, name in _ddp.parameter_names(model).items()}
        reduced = _ddp.reduced_parameters(model)
        self._order = _ddp.in_reducer_order(model, reduced)
        self._learns_graph = model.static_graph and not model._has_rebuilt_buckets
        if self._learns_graph:  # in the order of backward, which DDP would see in its second pass: Note [One layout]
            self._order = _ddp.rebuild_reducer(model, _ddp.reducer_options(model), reduced, self._order[::-1])
        self._facts = Facts(model, _ddp.parameter_names(model), reduced)
        self.native.set_always_ended(_ddp.tracks_unused(model))
        self.calls = _ddp.register_compressed(model, self.native)
        self._begun = self.steps
        self._own_calls = OwnCalls(model, self._lane, self._device)
        me = weakref.ref(self)

        def look_again() -> None:
            binding = me()
            if binding is not None:
                binding._look_again()

        enter(model, look_again, lambda failed: None)

    def release(self) -> None:
        """Gives the model back to plain DDP; the compressor keeps its state. Collective, between two steps."""
        model = self._model
        assert model is not None
        _ddp.rebuild_reducer(model, _ddp.reducer_options(model), _ddp.reduced_parameters(model))
        leave(model)
        Watch(model, "the removal of a compressor")
        self._own_calls.release()
        self.compressor.initial_step, self.compressor.binding = self.steps, None

    def _look_again(self) -> None:
        assert self._model is not None and self.calls is not None
        if self._learns_graph and self.calls.total == 0 and torch.is_grad_enabled():
            check_begins(self._model, "compress.register()")
        self._own_calls.before_forward(self.steps > self._begun)
        if self._facts.changed():
            self._facts.check()
            self._facts.note()

    def forget_groups(self, step: int) -> None:
        super().forget_groups(step)
        self._begun = step
        self.native.forget()

    def check_names(self) -> None:
        """Once every bucket was seen: whether the compressor's options name a parameter each."""
        if not self._names_checked:
            check_matched(self.compressor.patterns, self._params)
            self._names_checked = True

    def measure_next(self) -> None:
        self.native.measure_next()

    def stats(self) -> dict[str, Any]:
        return {**super().stats(), "exposed_ms": self.native.exposed_ns / 1e6}

    def _bind(self, index: int, bucket: _C.Bucket) -> list[_C.TwoPhaseExchange]:
        if self._model is None:
            for param in bucket.params:
                self._names.setdefault(id(param), f"parameter {len(self._names)} {list(param.shape)}")
        names = [self._names.get(id(param), "") for param in bucket.params]
        self._params.update(zip(names, bucket.params, strict=True))
        buffer = bucket.buffer.view(-1) if bucket.buffer.layout == torch.strided else bucket.buffer
        exchanges = self.bind(index, names, bucket.params, bucket.grads, buffer, buffer)
        self._slots.update(zip(names, bucket.grads, strict=True))
        return exchanges

    def _ended(self, nonfinite: bool) -> None:
        """At the end of a backward pass, when every ``.grad`` stands."""
        if self._learns_graph:
            assert self._model is not None
            check_learns(self._model, _ddp.reduced_parameters(self._model), "compress.register()")
            self._learns_graph = False
        self.compare_exact()
        bounds = [bound for bounds in self.bounds.values() for bound in bounds]
        if nonfinite:
            treat_nonfinite(self.compressor.nonfinite, bounds, self._params.values(), self._spoil)
        elif self._model is not None and _ddp.tracks_unused(self._model):
            # DDP drops the results for parameters that no rank has used.
            used = {self._names[id(param)] for param in _ddp.used_parameters(self._model, self._order) or ()}
            keep_unused(bounds, lambda name: name not in used, self.compressor.feedback.errors, self._put_back)
        self._lay_buckets()

    def _put_back(self, name: str) -> bool:
        """What stood in ``.grad`` of an unused parameter was in the bucket, and stays for the optimizer."""
        grad, slot = self._params[name].grad, self._slots[name]
        if grad is None:
            return False
        if lies_in(grad, [slot]):
            slot.zero_()  # gradient_as_bucket_view: the result has overwritten it, and would be applied; it is owed
        else:
            slot.copy_(grad)
        return True

    def _lay_buckets(self) -> None:
        """The layout of the first pass becomes that of all others, before anything is saved: owners have another error
        feedback in another layout. See Note [One layout] in :mod:`dear._schedule`."""
        if self._model is None or self._laid:
            return
        self._laid = True
        if not self._model.find_unused_parameters or self._model.static_graph:
            self.between_passes = True
            try:
                with self._own_calls.rebuild():
                    _ddp.rebuild_buckets(self._model, self.native)
            finally:
                self.between_passes = False

    def _spoil(self, bound: Bound) -> None:
        for name in bound.group.names:
            grad = self._params[name].grad
            if grad is not None:
                grad.fill_(torch.nan)


def _alive(binding: weakref.ref[HookBinding]) -> HookBinding:
    alive = binding()
    if alive is None:
        raise RuntimeError("The compressor was dropped while its model was training: keep a reference to it.")
    return alive
