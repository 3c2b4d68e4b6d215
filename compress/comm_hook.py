"""Compression as a plain DDP communication hook: ``.grad`` is the aggregated gradient after ``backward()``.

Note [What a hook sees of the model]
DDP hands over buckets of parameters, never their names, and rebuilds the buckets once, at the second step. State is
kept by name. :func:`register` knows the names. Under DDP's own ``register_comm_hook`` each parameter is called by the
order in which it was first seen and its shape, "parameter 3 [16, 37]", and recognised by identity from then on; the
order is that of the first backward pass, which is the same on all ranks and whenever the same model is trained, so
saved state fits. States saved under the two kinds of names do not mix.
"""

# Annotations are not postponed here: DDP compares a hook's with the types themselves.

import threading
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel as DDP

from compress.agree import agree
from compress.compressor import Compressor
from compress.group import Group, Member, matrix_shape
from compress.pipeline import Pipeline
from dear import _ddp


def comm_hook(state: Compressor, bucket: dist.GradBucket) -> Future[Tensor]:
    """A DDP communication hook: ``model.register_comm_hook(compress.ACPSGD(rank=4), compress.comm_hook)``.

    The model's process group must be the default one, or be given to the compressor as ``process_group``. Encoding
    happens at once, on the autograd thread; exchanges and decoding go on while backward does.

    Raises, from ``backward()``:
        ValueError: ranks are not configured alike, or something cannot be compressed; the same on every rank.
        RuntimeError: a peer has died or stalled; or a gradient is not finite, with ``nonfinite="raise"``.
    """
    if not isinstance(state, Compressor):
        raise TypeError(f"compress.comm_hook needs a compressor as its state, not {type(state).__name__}.")
    if state.driver is None:
        state.driver = HookDriver(state)
    return state.driver.on_bucket(bucket)  # type: ignore[no-any-return]


def register(model: DDP, compressor: Compressor) -> None:
    """Makes ``compressor`` the communication hook of a DDP module, with its parameters' names and process group.

    As ``model.register_comm_hook(compressor, compress.comm_hook)``, which it calls; and it checks first what can be
    checked, saves state under the names of ``model.module``, and keeps the error feedback of parameters that no rank
    has used in a step, which that call cannot know. The hook runs in Python. Every rank must call it.

    Raises:
        TypeError, ValueError, RuntimeError: this cannot work; one sentence says why, on every rank, and nothing has
            been changed.
    """
    if not isinstance(compressor, Compressor):
        raise TypeError(f"compress.register() needs a compressor, not {type(compressor).__name__}.")
    if not isinstance(model, DDP):
        raise TypeError(
            f"compress.register() needs a DistributedDataParallel module, not {type(model).__name__}: wrap the model "
            "in torch.nn.parallel.DistributedDataParallel first."
        )
    if compressor.driver is not None:
        raise RuntimeError("This compressor serves a model already, and keeps its state: make another one.")
    if _ddp.has_hook(model):
        raise RuntimeError(
            "This DDP module has a communication hook already, and DDP takes only one: use a module on which "
            "register_comm_hook() was not called."
        )
    if model.mixed_precision is not None:
        raise ValueError(
            "DDP's own mixed_precision uses the communication hook's place: leave it out and use torch.autocast, or "
            "keep the parameters in 16 bits."
        )
    for name, module in model.module.named_modules():
        if getattr(module, "sparse", False):
            raise ValueError(
                f"The module {name} makes sparse gradients, which are compressed already: build it with sparse=False."
            )
    names = {id(param): name for name, param in model.module.named_parameters() if param.requires_grad}
    sizes = {name: param.numel() for name, param in model.module.named_parameters() if param.requires_grad}
    compressor.process_group = model.process_group
    agree(compressor.ranks(), _facts(compressor), compressor.stranger(sizes))
    compressor.driver = HookDriver(compressor, model, names)
    model.register_comm_hook(compressor, comm_hook)


def _facts(compressor: Compressor) -> dict[str, Any]:
    return {
        "compressor": type(compressor).__name__,
        **compressor.options(),
        "error_feedback": compressor.error_feedback,
        "start_step": compressor.start_step,
        "min_compression_ratio": compressor.min_compression_ratio,
        "nonfinite": compressor.nonfinite,
        "step": compressor.step,
    }


@dataclass
class _Bound:
    """A group and where its members lie in a bucket; ``whole`` where they lie as they do in the group."""

    group: Group
    begins: list[int]

    @property
    def whole(self) -> bool:
        offsets = [begin - member.start for begin, member in zip(self.begins, self.group.members, strict=True)]
        return len(set(offsets)) == 1

    def take(self, buffer: Tensor) -> None:
        """Points the group's gradient into the bucket, or copies it out."""
        group = self.group
        if self.whole:
            group.gradient = buffer[self.begins[0] : self.begins[0] + group.numel]
            return
        group.gradient = group.buffer("gradient", (group.numel,), group.dtype)
        for begin, member in zip(self.begins, group.members, strict=True):
            group.slice_of(member).copy_(buffer[begin : begin + member.numel])

    def give(self, buffer: Tensor) -> None:
        """Copies the result back into the bucket where it is not there."""
        if not self.whole:
            for begin, member in zip(self.begins, self.group.members, strict=True):
                buffer[begin : begin + member.numel].copy_(self.group.slice_of(member))


class HookDriver:
    """Feeds a compressor from DDP's buckets. ``on_bucket`` is called on the autograd thread, bucket after bucket."""

    def __init__(self, compressor: Compressor, model: DDP | None = None, names: dict[int, str] | None = None) -> None:
        self._compressor = compressor
        self._model = model
        self._names = names if names is not None else {}
        self._named = names is not None
        self._params: dict[str, Tensor] = {}
        self._pipeline: Pipeline | None = None
        self._bound: dict[tuple[int, ...], list[_Bound]] = {}
        self._active: list[Group] = []
        self._errors: list[BaseException] = []
        self._lock = threading.Lock()

    def forget_groups(self) -> None:
        """The compressor has loaded a state: groups are to be made anew."""
        self._bound.clear()

    def on_bucket(self, bucket: dist.GradBucket) -> Future[Tensor]:
        """Starts one bucket on its way; the future is complete when the aggregate is in it."""
        buffer = bucket.buffer()
        future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        if bucket.index() == 0:
            self._begin()
        # An error is raised by _end, when DDP has finished with its buckets: it cannot be left half way.
        if not self._errors:
            try:
                self._start(bucket, buffer, future)
                return future
            except Exception as error:
                self._errors.append(error)
        future.set_result(buffer)
        return future

    def _begin(self) -> None:
        self._active, self._errors = [], []
        self._compressor.step += 1
        # DDP's own end of backward is queued after this, so ours queues itself once more.
        engine = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: engine.queue_callback(self._end))

    def _start(self, bucket: dist.GradBucket, buffer: Tensor, future: Future[Tensor]) -> None:
        key = tuple(id(param) for param in bucket.parameters())
        bounds = self._bound.get(key)
        if bounds is None:
            bounds = self._bind(bucket, buffer)
            for old in [old for old in self._bound if not set(old).isdisjoint(key)]:
                del self._bound[old]
            self._bound[key] = bounds
        assert self._pipeline is not None
        for bound in bounds:
            bound.take(buffer)
            if self._compressor._measure:
                exact = bound.group.gradient.double()
                dist.all_reduce(exact, group=self._compressor.ranks())
                bound.group.exact = exact.div_(bound.group.world)
            self._active.append(bound.group)
        left = len(bounds)

        def done(error: BaseException | None) -> None:
            nonlocal left
            with self._lock:
                if error is not None:
                    self._errors.append(error)
                left -= 1
                if left:
                    return
            try:
                for bound in bounds:
                    bound.give(buffer)
            except BaseException as failure:  # nothing may keep the future from completing
                self._errors.append(failure)
            future.set_result(buffer)

        for bound in bounds:
            self._pipeline.submit(self._compressor.steps(bound.group), bound.group.label, done)

    def _bind(self, bucket: dist.GradBucket, buffer: Tensor) -> list[_Bound]:
        """Groups for a bucket that is seen for the first time. Collective, and raises on all ranks alike."""
        compressor, params = self._compressor, bucket.parameters()
        if not self._named:
            for param in params:
                self._names.setdefault(id(param), f"parameter {len(self._names)} {list(param.shape)}")
        names = [self._names.get(id(param), "") for param in params]
        self._params.update(zip(names, params, strict=True))
        sizes = {name: param.numel() for name, param in zip(names, params, strict=True)}
        facts = _facts(compressor) | {"the parameters of a bucket": sizes, "seed": compressor.seed}
        complaint = _complaint(names, params, buffer) or compressor.stranger(sizes)
        compressor.seed = agree(compressor.ranks(), facts, complaint, free=("seed",))["seed"]
        if self._pipeline is None:
            self._pipeline = Pipeline(
                compressor.ranks(), buffer.device, compressor.stages, compressor.exchange == "owners"
            )
        begins: dict[str, int] = {}
        shapes, offset = {}, buffer.storage_offset()
        for name, grad in zip(names, bucket.gradients(), strict=True):
            begins[name], shapes[name] = int(grad.storage_offset() - offset), matrix_shape(grad)
        bounds: list[_Bound] = []
        for part in compressor.planned(names):
            members, start = [], 0
            for name in part:
                members.append(Member(name, start, *shapes[name]))
                start += sizes[name]
            label = f"bucket {bucket.index()}" + (f", part {len(bounds)}" if len(part) < len(names) else "")
            group = compressor.make_group(members, buffer.dtype, buffer.device, label)
            group.label = label
            bounds.append(_Bound(group, [begins[name] for name in part]))
        return bounds

    def _end(self) -> None:
        """At the end of backward, when every ``.grad`` stands."""
        active, compressor = self._active, self._compressor
        self._active = []
        if self._errors:
            raise self._errors[0]
        self._note_error(active)
        bad = [group for group in active if group.bad is not None and bool((group.bad != 0).any())]
        if not bad:
            self._keep_unused(active)
            return
        if compressor.nonfinite == "raise":
            raise RuntimeError(
                f"On some rank a gradient in {bad[0].label} (from {bad[0].names[0]} to {bad[0].names[-1]}) is not "
                'finite: look for the cause, or pass nonfinite="skip", or with a GradScaler nonfinite="propagate".'
            )
        for group in active:
            if group.compressed:
                group.roll_back()
        if compressor.nonfinite == "skip":
            for param in self._params.values():
                param.grad = None
            return
        for group in bad:
            for name in group.names:
                grad = self._params[name].grad
                if grad is not None:
                    grad.fill_(torch.nan)

    def _note_error(self, active: list[Group]) -> None:
        if not self._compressor._measure:
            return
        self._compressor._measure = False
        wrong = total = 0.0
        for group in active:
            if group.exact is not None:
                wrong += float((group.gradient.double() - group.exact).square().sum())
                total += float(group.exact.square().sum())
                group.exact = None
        self._compressor._vnmse = wrong / total if total else 0.0

    def _keep_unused(self, active: list[Group]) -> None:
        """DDP drops the result for parameters that no rank has used: it goes back to the error feedback."""
        if self._model is None or not _ddp.tracks_unused(self._model):
            return
        used = _ddp.used_parameters(self._model, _ddp.reducer_parameters(self._model)) or set()
        kept = {self._names[id(param)] for param in used if id(param) in self._names}
        for group in active:
            for member in group.members:
                error = self._compressor.feedback.errors.get(member.name)
                if group.compressed and member.name not in kept and error is not None:
                    error.add_(group.slice_of(member))


def _complaint(names: list[str], params: list[Tensor], buffer: Tensor) -> str | None:
    """What is wrong with a bucket, in one sentence."""
    if buffer.layout != torch.strided:
        return f"The gradient of {names[0]} is sparse, and so compressed already: build its module with sparse=False."
    for name, param in zip(names, params, strict=True):
        if not name:
            return "A bucket holds a parameter that the model did not have when the compressor was registered."
        if not param.is_floating_point():
            return (
                f"The parameter {name} is {param.dtype}, whose gradient cannot be compressed: hold it as a real "
                "floating-point tensor, or set requires_grad=False."
            )
    return None
