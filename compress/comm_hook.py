"""Compression as a plain DDP communication hook: ``.grad`` is the aggregated gradient after ``backward()``.

Note [What a hook sees of the model]
DDP hands over buckets of parameters, never their names, and rebuilds the buckets once, at the second step. State is
kept by name. :func:`register` knows the names. Under DDP's own ``register_comm_hook`` each parameter is called by the
order in which it was first seen and its shape, "parameter 3 [16, 37]", and recognised by identity from then on; the
order is that of the first backward pass, which is the same on all ranks and whenever the same model is trained, so
saved state fits. States saved under the two kinds of names do not mix.
"""

# Annotations are not postponed here: DDP compares a hook's with the types themselves.

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel as DDP

from compress.checks import REMEDY, check_kind, check_new, facts
from compress.compressor import Compressor
from compress.driver import Driver, not_finite
from dear import _C, _ddp
from dear._agree import agree


def comm_hook(state: Compressor, bucket: dist.GradBucket) -> Future[Tensor]:
    """A DDP communication hook: ``model.register_comm_hook(compress.ACPSGD(rank=4), compress.comm_hook)``.

    The model's process group must be the default one, or be given to the compressor as ``process_group``. Encoding
    happens at once, on the autograd thread; exchanges and decoding go on while backward does.

    Raises, from ``backward()``:
        TypeError: the state is not a compressor.
        ValueError: ranks are not configured alike, or something cannot be compressed; the same on every rank.
        RuntimeError: a peer has died or stalled; or a gradient is not finite, with ``nonfinite="raise"``.
    """
    check_kind(state, "compress.comm_hook")
    if state.driver is None:
        agree(state.ranks(), lambda: facts(state), REMEDY)
        state.driver = HookDriver(state, bucket.buffer().device)
    # DDP wants a future of a Python object from a Python hook; the native one holds a tensor.
    return state.driver.native.on_bucket(bucket).then(_value)  # type: ignore[no-any-return]


def _value(future: Future[Tensor]) -> Tensor:
    return future.value()


def register(model: DDP, compressor: Compressor) -> None:
    """Makes ``compressor`` the communication hook of a DDP module, natively: no step takes the interpreter lock.

    As ``model.register_comm_hook(compressor, compress.comm_hook)``; and it checks first what can be checked, saves
    state under the names of ``model.module``, and keeps the error feedback of parameters that no rank has used in a
    step, which that call cannot know. Compressors written in Python take the lock for their own work only. Every rank
    must call it.

    Raises:
        TypeError, ValueError, RuntimeError: this cannot work; one sentence says why, on every rank, and nothing has
            been changed.
    """
    _ddp.check_kind(model, "compress.register()")

    def look() -> dict[str, Any]:
        known = check_new(compressor, model, "compress.register()")
        _ddp.check_hookable(model)
        return known

    agree(model.process_group, look, REMEDY)
    compressor.process_group = model.process_group
    names = {id(param): name for name, param in model.module.named_parameters() if param.requires_grad}
    device = next(iter(model.module.parameters())).device
    compressor.driver = HookDriver(compressor, device, model, names)
    compressor.driver.calls = _ddp.register_driver(model, compressor.driver.native)
    model._comm_hooks.append((comm_hook, compressor))  # as register_comm_hook() does: who has the model has it


class HookDriver(Driver):
    """The native driver's Python half: names, groups, and what a backward pass that needs attention gets."""

    calls: _C.HookCalls | None = None  # of the native hook, counted

    def __init__(
        self, compressor: Compressor, device: Any, model: DDP | None = None, names: dict[int, str] | None = None
    ) -> None:
        super().__init__(compressor, device)
        self._model = model
        self._names = names if names is not None else {}
        self._named = names is not None
        self._params: dict[str, Tensor] = {}
        me = weakref.ref(self)  # the model's reducer holds the native driver, and must not hold the model

        def bind(index: int, bucket: _C.Bucket) -> list[_C.Relay]:
            return _alive(me)._bind(index, bucket)

        def measure(index: int) -> None:
            _alive(me).note_exact(index)

        def ended(bad: Sequence[int]) -> None:
            _alive(me)._ended(bad)

        self.native = _C.CompressDriver(self.pipeline, bind, measure, ended)
        if compressor.take_measure():
            self.native.measure_next()
        if model is not None and _ddp.tracks_unused(model):
            self.native.set_always_ended(True)

    def forget_groups(self) -> None:
        super().forget_groups()
        self.native.forget()

    def measure_next(self) -> None:
        self.native.measure_next()

    def stats(self) -> dict[str, Any]:
        return {**super().stats(), "exposed_ms": self.native.exposed_ns / 1e6}

    def _bind(self, index: int, bucket: _C.Bucket) -> list[_C.Relay]:
        if not self._named:
            for param in bucket.params:
                self._names.setdefault(id(param), f"parameter {len(self._names)} {list(param.shape)}")
        names = [self._names.get(id(param), "") for param in bucket.params]
        self._params.update(zip(names, bucket.params, strict=True))
        buffer = bucket.buffer.view(-1) if bucket.buffer.layout == torch.strided else bucket.buffer
        return self.bind(index, names, bucket.params, bucket.grads, buffer, buffer)

    def _ended(self, bad: Sequence[int]) -> None:
        """At the end of a backward pass, when every ``.grad`` stands."""
        self.compare_exact()
        if not bad:
            self._keep_unused()
            return
        compressor = self.compressor
        bounds = [bound for index in bad for bound in self.bounds[index] if bound.relay.is_bad()]
        if compressor.nonfinite == "raise":
            raise not_finite(bounds[0])
        self.native.roll_back()
        if compressor.nonfinite == "skip":
            for param in self._params.values():
                param.grad = None
            return
        for bound in bounds:
            for name in bound.group.names:
                grad = self._params[name].grad
                if grad is not None:
                    grad.fill_(torch.nan)

    def _keep_unused(self) -> None:
        """DDP drops the result for parameters that no rank has used: it goes back to the error feedback."""
        if self._model is None or not _ddp.tracks_unused(self._model):
            return
        used = _ddp.used_parameters(self._model, _ddp.reducer_parameters(self._model)) or set()
        kept = {self._names[id(param)] for param in used if id(param) in self._names}
        for bound in [bound for bounds in self.bounds.values() for bound in bounds if bound.relay.compressed()]:
            for index, member in enumerate(bound.group.members):
                error = self.compressor.feedback.errors.get(member.name)
                if member.name not in kept and error is not None:
                    error.add_(bound.result(index))


def _alive(driver: "weakref.ref[HookDriver]") -> HookDriver:
    alive = driver()
    if alive is None:
        raise RuntimeError("The compressor was dropped while its model was training: keep a reference to it.")
    return alive
