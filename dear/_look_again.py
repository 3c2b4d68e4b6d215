"""What ``attach`` read of the model, compared at every step boundary: none of it may change in silence."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from dear import _C

Param = torch.nn.Parameter


#: What a DDP module's reducer is built with, and this library relies on. Of its other options DDP reads some in every
#: pass, as broadcast_buffers, and the rest never again.
_OPTIONS = ("static_graph", "find_unused_parameters", "process_group")


class Facts:
    """Type, place, strides and ``requires_grad`` of every parameter of a model, and how DDP was built."""

    def __init__(self, model: DDP, names: dict[Param, str], reduced: Iterable[Param]) -> None:
        """``reduced``: those whose gradients DDP reduces."""
        self._options = model.__dict__
        self._built = [self._options[name] for name in _OPTIONS]
        self._names = names
        self._params = list(names)
        self._reduced = set(reduced)
        self.note()

    def note(self) -> None:
        """Takes the model as it is now."""
        self._fingerprint = _C.fingerprint(self._params)
        with torch._C.DisableTorchFunctionSubclass():
            self._shapes = [param.shape for param in self._params]
            self._strides = [param.stride() for param in self._params]
            self._types = [(param.dtype, param.device) for param in self._params]
        self._accumulators = [_accumulator(param) for param in self._params]

    def changed(self) -> bool:
        """Whether anything has. Cheap: some 20 ns a parameter."""
        return self._changed_option() is not None or bool(_C.fingerprint(self._params) != self._fingerprint)

    def _changed_option(self) -> str | None:
        for name, built in zip(_OPTIONS, self._built, strict=True):
            if self._options[name] is not built:
                return name
        return None

    def check(self) -> None:
        """Refuses changes that DDP could not follow: its buckets have the type and the strides of the parameters, and
        its reducer is built once.

        Raises:
            RuntimeError: a reduced parameter has another type or other strides, is on another device, or had another
                type meanwhile; or DDP has got another option.
        """
        option = self._changed_option()
        if option is not None:
            raise RuntimeError(
                f"The {option} of the DistributedDataParallel module was changed while this library is under it, which "
                "has built its own reducer with the one before: set it where the model is wrapped, or at least before "
                "dear.attach() or compress.register()."
            )
        known = zip(self._params, self._shapes, self._strides, self._types, self._accumulators, strict=True)
        for param, shape, stride, kind, accumulator in known:
            if param not in self._reduced:
                continue
            if (param.dtype, param.device) != kind:
                raise RuntimeError(
                    f"The parameter {self._names[param]} was changed from {kind[0]} on {kind[1]} to {param.dtype} on "
                    f"{param.device} under DistributedDataParallel: convert the model before it is wrapped."
                )
            if param.shape != shape:
                raise RuntimeError(
                    f"The parameter {self._names[param]} was given the shape {tuple(param.shape)} in place of "
                    f"{tuple(shape)} under DistributedDataParallel, whose buckets have the old one: change the model "
                    "before it is wrapped."
                )
            if param.stride() != stride:
                raise RuntimeError(
                    f"The parameter {self._names[param]} was given the strides {param.stride()} in place of {stride} "
                    "under DistributedDataParallel, whose buckets follow the old ones: convert the model, as with "
                    "to(memory_format=torch.channels_last), before it is wrapped."
                )
            now = _accumulator(param)
            if accumulator is not None and now is not None and now is not accumulator:
                raise RuntimeError(
                    f"The parameter {self._names[param]} was given another tensor (converted and back, set_(), or a "
                    "parametrization removed), by which it has lost DistributedDataParallel's hook, so its gradient "
                    "would not be reduced: change a copy, or wrap the model again."
                )

    def check_members(self, params: Sequence[Param]) -> None:
        """Refuses an optimizer of parameters that DDP would not train alike on all ranks.

        Raises:
            ValueError: a parameter is not in the model, or in two optimizers.
            RuntimeError: a parameter is trained, and DDP does not reduce its gradient.
        """
        check_members(params, self._names, self._reduced)


def _accumulator(param: Param) -> Any:
    """What adds to the parameter's gradient, with DDP's hook; None where it requires none. torch makes another one
    where the parameter is given a tensor of another type."""
    if not param.requires_grad:
        return None
    with torch.inference_mode(False), torch.enable_grad(), torch._C.DisableTorchFunctionSubclass():
        return param.view_as(param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]


def check_members(params: Sequence[Param], names: dict[Param, str], reduced: set[Param]) -> None:
    """See :meth:`Facts.check_members`."""
    strangers = [param for param in params if param not in names]
    if strangers:
        raise ValueError(
            f"The optimizer holds {len(strangers)} parameters that are not in the DDP module, so nobody would reduce "
            "their gradients: give them an optimizer of their own, or put them into the module."
        )
    seen: set[Param] = set()
    for param in params:
        if param in seen:
            raise ValueError(
                f"The parameter {names[param]} is in two optimizers, which would update it twice: leave it in one."
            )
        seen.add(param)
    for param in params:
        if param.requires_grad and param not in reduced:
            raise RuntimeError(
                f"The parameter {names[param]} did not require a gradient when the model was wrapped, or DDP was told "
                "to ignore it, so DDP does not reduce its gradient and replicas would part: call engine.detach(), thaw "
                "it, wrap the model again, and attach."
            )


def overlapping(names: dict[Param, str]) -> tuple[str, str] | None:
    """The names of two parameters that share memory, if there are any."""
    spans: list[tuple[Any, int, int, str]] = []
    for param, name in names.items():
        if param.numel() and not param.is_meta:
            storage = param.untyped_storage()
            reach = sum((size - 1) * abs(stride) for size, stride in zip(param.shape, param.stride(), strict=True)) + 1
            begin = param.data_ptr()
            spans.append((storage.data_ptr(), begin, begin + reach * param.element_size(), name))
    spans.sort(key=lambda span: span[:3])
    for (storage, _, end, name), (other, begin, _, next_name) in itertools.pairwise(spans):
        if storage == other and begin < end:
            return name, next_name
    return None
