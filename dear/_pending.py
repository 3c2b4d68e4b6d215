"""The barrier: a parameter that is not finished says so by its class.

Note [Pending parameters]
Between ``optimizer.step()`` and the moment a parameter stands, nobody may read or write it without the wait, by
whatever road: a module's forward, an attribute, a list kept from before, ``param_groups``, ``.data``, a foreach
operator, a copy, a pickle. So for that time ``param.__class__`` is a subclass of its own class whose
``__torch_function__`` finishes the parameter, restores the class, and lets the call go on. Its metadata (shape, dtype,
``requires_grad``, ``.grad``) pass without a wait. What reaches the tensor below Python (a functorch wrapper, an
operator called from C++) is caught by ``__torch_dispatch__``, for which the tensor carries the dispatch key meanwhile.

Module hooks settle parameters before they are read, in the order of the forward pass; they are there for speed alone.

Aliases that were made before ``step()`` are ordinary tensors, and nothing stops who reads them. So a step that finds
any finishes at once (``_C.has_aliases``).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_iter

from dear import _C

Param = torch.nn.Parameter

# What tells about a tensor without its values. Version counters and addresses do not pass: whoever asks means values.
_NAMES = (
    "shape", "dtype", "device", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "ndim", "itemsize", "nbytes",
    "is_sparse", "is_sparse_csr", "is_cuda", "is_cpu", "is_xpu", "is_mps", "is_meta", "is_quantized", "is_nested",
    "is_mkldnn", "is_vulkan", "names", "output_nr", "retains_grad", "_backward_hooks", "_post_accumulate_grad_hooks",
)  # fmt: skip
_METADATA = {getattr(torch.Tensor, name).__get__ for name in _NAMES if hasattr(torch.Tensor, name)}
_METADATA |= {
    torch.Tensor.grad.__set__,  # type: ignore[union-attr]
    torch.Tensor.grad.__delete__,  # type: ignore[union-attr]
    torch.Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
    torch.Tensor._backward_hooks.__set__,  # type: ignore[union-attr]
    torch.Tensor.requires_grad_,
    torch.Tensor.register_hook,
    torch.Tensor.register_post_accumulate_grad_hook,
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.stride,
    torch.Tensor.storage_offset,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.is_contiguous,
    torch.Tensor.get_device,
    torch.Tensor.is_shared,
    torch.Tensor.__len__,
    torch.is_floating_point,
    torch.is_complex,
}


class Pending:
    """What the classes of pending parameters add to the parameter's own class."""

    _dear_kind: type  # the parameter's own class
    _dear_pending: tuple[Barrier, int]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """``type(param)(...)`` makes a parameter of the own class, which is finished."""
        return cls._dear_kind(*args, **kwargs)

    def detach(self) -> torch.Tensor:  # type: ignore[override]
        """As that of the parameter's own class."""
        settle(self)
        plain = torch.Tensor.detach(self)  # type: ignore[arg-type]
        # HACK: where nn.Parameter(param) does not know the class it wants a detached tensor of the class as it is then.
        if sys._getframe(1).f_code is Param.__new__.__code__:
            return torch.Tensor._make_subclass(type(self), plain)  # type: ignore[type-var, return-value]
        return plain

    @classmethod
    @_disable_dynamo
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _METADATA and _settle_among(args, kwargs):
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():  # hidden in an object: its operators show it
            return func(*args, **kwargs)

    @classmethod
    @_disable_dynamo
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _settle_among(args, kwargs)
        return func(*args, **kwargs)

    # Copies and pickles look at the class before they call anything.

    def __deepcopy__(self, memo: Any) -> Any:
        settle(self)
        return self.__deepcopy__(memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        settle(self)
        return self.__reduce_ex__(protocol)


def settle(value: Any) -> None:
    """Finishes a parameter that was pending a moment ago: another thread may have done so since."""
    mark = value.__dict__.get("_dear_pending")
    if mark is not None:
        barrier, group = mark
        barrier.settle((group,))
        if barrier.finishes(group):
            raise RuntimeError(
                "A parameter was used while its own update was under way, by a signal's handler or by what the update "
                "calls: let the handler set a flag, and look at it behind optimizer.step()."
            )


def _settle_among(args: Any, kwargs: Any) -> bool:
    """Finishes what is pending among the arguments; whether anything was."""
    found = [value for value in tree_iter((args, kwargs)) if isinstance(value, Pending)]
    for value in found:
        settle(value)
    return bool(found)


_classes: dict[type, type] = {}


def _pending_class(kind: type) -> type:
    """The class of a pending parameter whose class is ``kind``."""
    if kind not in _classes:
        _classes[kind] = type(f"Pending{kind.__name__}", (Pending, kind), {"__module__": __name__, "_dear_kind": kind})
    return _classes[kind]


def _with_classes(params: Iterable[Param]) -> list[tuple[Param, type, type]]:
    """With each parameter its class, and that of it while it is pending."""
    return [(param, type(param), _pending_class(type(param))) for param in params]


def can_be_pending(param: Param) -> bool:
    """Whether the parameter's class can be changed for a while, as that of ``nn.Parameter`` can."""
    kind = type(param)
    try:
        param.__class__ = _pending_class(kind)
        param.__class__ = kind
    except TypeError:
        return False
    return True


def unguarded(params: Iterable[Param]) -> list[torch.Tensor]:
    """The memory of parameters, pending or not, as plain tensors: for those who finish them, and drop these then."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
        return [torch.Tensor.detach(param) for param in params]


class Barrier:
    """The parameters of fusion groups that are on their way, and who finishes them.

    Threads: any may touch a pending parameter; one of them finishes it while the others wait.
    """

    #: ``arrive(group)`` waits for what the group needs. A signal's handler may run meanwhile, and finish it: see
    #: Note [Ctrl-C] in csrc/collectives/interrupt.h.
    arrive: Callable[[int], None]
    #: ``finish(group)`` does what ``step()`` left to do. Its parameters are pending all the while, so that other
    #: threads wait: it writes to what :func:`unguarded` gives. Both are to be set before a group is closed.
    finish: Callable[[int], None]

    def __init__(self) -> None:
        self._finishing: set[int] = set()
        self._members: list[list[tuple[Param, type, type]]] = []  # by group: parameter, its class, its pending class
        self._lock = threading.RLock()
        self._process = os.getpid()
        self.pending: set[int] = set()

    def set_groups(self, members: Iterable[Iterable[Param]]) -> None:
        """The parameters of each fusion group. Nothing may be pending."""
        assert not self.pending
        self._members = [_with_classes(group) for group in members]

    def close(self, groups: Iterable[int]) -> None:
        """From here on the parameters of these groups are pending."""
        for group in groups:
            with self._lock:  # another thread may look for what is pending
                self._close(group)

    def _close(self, group: int) -> None:
        self.pending.add(group)
        mark = (self, group)
        if any(type(param) is not kind for param, kind, _ in self._members[group]):  # given another class since
            self._members[group] = _with_classes(param for param, _, _ in self._members[group])
        for param, _, pending in self._members[group]:
            param._dear_pending = mark  # type: ignore[attr-defined]
            param.__class__ = pending
        _C.set_python_dispatch([param for param, _, _ in self._members[group]], True)

    def settle(self, groups: Iterable[int]) -> None:
        """Finishes those of the groups that are pending.

        Raises:
            RuntimeError: what was left to do has failed, and the parameters stay pending; or this is a forked child,
                where nobody can finish them.
        """
        if self.pending:
            self._settle(groups)

    @_disable_dynamo
    def _settle(self, groups: Iterable[int]) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                "A parameter was used in a forked process while its update was under way in the parent: call "
                "engine.synchronize() before the process is forked."
            )
        with self._lock:
            for group in groups:
                if self._waits_for(group):
                    self.arrive(group)
                    if self._waits_for(group):
                        self._finishing.add(group)
                        try:
                            self.finish(group)
                            self._open(group)
                            self.pending.remove(group)
                        finally:
                            self._finishing.remove(group)

    def _waits_for(self, group: int) -> bool:
        return group in self.pending and group not in self._finishing

    def finishes(self, group: int) -> bool:
        """Whether this thread, for which no other one has it, is finishing the group."""
        if group not in self._finishing:
            return False
        with self._lock:
            return group in self._finishing

    def give_up(self) -> None:
        """Nothing more can be finished: what is pending is left as it is."""
        for group in self.pending:
            self._open(group)
        self.pending.clear()

    def _open(self, group: int) -> None:
        members = self._members[group]
        _C.set_python_dispatch([param for param, _, _ in members], False)
        for param, kind, _ in members:
            param.__class__ = kind
            del param._dear_pending  # type: ignore[attr-defined]
