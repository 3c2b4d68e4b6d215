"""Tensors that take the place of ``.grad`` while a gradient is not, or not yet, what plain DDP would show there.

Wrong order is never silent: code that reads a gradient which is only one worker's own gets a sentence that says so,
and code that reads or writes one which is still on its way waits for it, also when it does so below Python.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map

from dear import _C

Placeholders = list[tuple[torch.nn.Parameter, torch.Tensor]]

# What Optimizer.zero_grad() and DDP do with a gradient without looking at its values.
_METADATA = (
    "shape", "dtype", "device", "layout", "grad_fn", "requires_grad", "is_sparse", "is_cuda", "is_cpu", "is_leaf",
    "is_quantized", "is_meta", "ndim", "itemsize", "nbytes", "_version", "_backward_hooks", "grad", "names",
)  # fmt: skip
_HARMLESS = {
    torch.Tensor.zero_,
    torch.Tensor.detach_,
    torch.Tensor.requires_grad_,
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.stride,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_complex,
    torch.Tensor.data_ptr,
    torch.Tensor.untyped_storage,  # whose size memory reports ask
    torch.Tensor.storage_offset,
    torch.Tensor.is_inference,
    torch.Tensor.is_conj,
    torch.Tensor.is_neg,
    torch.Tensor._is_view,
    torch.Tensor._is_zerotensor,
    torch._has_compatible_shallow_copy_type,
    torch._foreach_zero_,
    *(getattr(torch.Tensor, name).__get__ for name in _METADATA if hasattr(torch.Tensor, name)),
}
# What a conversion of the whole model calls, which most often changes nothing.
_CONVERSIONS = {getattr(torch.Tensor, name) for name in ("to", "cpu", "cuda", "float", "double", "half", "bfloat16")}
_ZERO = (torch.Tensor.zero_, torch._foreach_zero_)
_ZERO_OPERATORS = (torch.ops.aten.zero_.default, torch.ops.aten._foreach_zero_.default)
_SHOWN = "<this worker's own gradient; the average is held in shards>"
_NO_GRAPH = -1  # what torch calls the backward pass of a thread that runs none


def _called(func: Any) -> str:
    """What a user knows the function as: an attribute's getter by the attribute's name."""
    name = getattr(func, "__name__", str(func))
    return str(func.__self__.__name__ if name in ("__get__", "__set__", "__delete__") else name)


class Placeholder(torch.Tensor):
    """What both have in common: methods of torch's that ask no class."""

    def as_subclass(self, cls: type[Any]) -> Any:
        return self.__torch_function__(torch.Tensor.as_subclass, (type(self),), (self, cls))


class LocalGrad(Placeholder):
    """This worker's own gradient, under ``update="sharded"`` or ``"owned"``: the average exists only in shards, and
    answers there what it can (:mod:`dear._grad_operators`)."""

    settle: Callable[[], None]
    follow: Callable[[], None]
    place: int  # in the layout
    answer: Callable[[Any, Any, Any], Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ZERO:  # the bucket may be on its way still
            for value in tree_iter(args):
                if isinstance(value, LocalGrad):
                    value.settle()
        if func is torch.Tensor.detach_:  # it is, and a view cannot be told so
            return args[0]
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func in _CONVERSIONS:
            with torch._C.DisableTorchFunctionSubclass():
                converted = func(*args, **(kwargs or {}))
            if converted is args[0]:
                return converted
        if func == torch.Tensor.data.__set__ and args[0] is args[1]:  # type: ignore[attr-defined]
            return None
        if func is torch.Tensor.__repr__:
            return _SHOWN
        if func is torch.Tensor.__format__:
            return format(_SHOWN, *args[1:])
        grad = next(value for value in tree_iter((args, kwargs)) if isinstance(value, LocalGrad))
        answer = grad.answer(func, args, kwargs or {})
        if answer is not NotImplemented:
            return answer
        raise _refused(_called(func))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What comes from below Python, where the tensor carries the dispatch key: autograd, which adds to it, scripted
        functions, torch.vmap(). It carries it until it is set to zero or added to."""
        adds = torch._C._current_graph_task_id() != _NO_GRAPH
        if not adds and func not in _ZERO_OPERATORS:
            refused = _refused(func._schema.name.split("::")[-1])
            warnings.warn(str(refused), RuntimeWarning, stacklevel=2)  # TorchScript drops the words of an error
            raise refused
        for value in tree_iter((args, kwargs)):
            if isinstance(value, LocalGrad):
                (value.follow if adds else value.settle)()
                _C.set_python_dispatch([value], False)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _refused(called: str) -> RuntimeError:
    return RuntimeError(
        f"{called} was called on a .grad that is this worker's own, because with "
        'update="sharded" or "owned" the average exists only in shards: give dear.attach() every optimizer that '
        "steps, ask for norms of whole gradients (p.grad.norm(math.inf) is not finite where an element is not), "
        'scale or clamp in place, use dear.attach(..., update="replicated"), or call zero_grad() before the model is '
        "converted or moved."
    )


class PendingGrad(Placeholder):
    """An averaged gradient that may still be on its way, under ``update="replicated"``; touching it waits for it.

    Autograd adds to gradients, and DDP copies them, below Python: their operators come to ``__torch_dispatch__``.
    """

    settle: Callable[[], None]
    plain: torch.Tensor  # the same memory
    of: weakref.ref[torch.nn.Parameter]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _HARMLESS and func not in _ZERO and func is not torch.Tensor.untyped_storage:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return func(*tree_map(_settled, args), **tree_map(_settled, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(_settled, args), **tree_map(_settled, kwargs or {}))


def _settled(value: Any) -> Any:
    """In the place of a placeholder the tensor that is shown in its place now: it may be given other memory."""
    if not isinstance(value, PendingGrad):
        return value
    value.settle()
    with torch._C.DisableTorchFunctionSubclass():
        param = value.of()
        grad = param.grad if param is not None else None
        if grad is None or type(grad) is not torch.Tensor or grad.layout != torch.strided:
            return value.plain
        same = (grad.data_ptr(), grad.shape, grad.stride()) == (value.plain.data_ptr(), value.shape, value.stride())
        return grad if same else value.plain


def local_grad(
    view: torch.Tensor,
    place: int,
    settle: Callable[[], None],
    follow: Callable[[], None],
    answer: Callable[[Any, Any, Any], Any],
) -> LocalGrad:
    """``view`` of a bucket as a gradient that nobody may read; ``settle`` is called before it is set to zero, and
    ``answer`` is asked about everything else: it takes a function and its arguments. ``follow`` is called before
    autograd adds to it."""
    grad = view.as_subclass(LocalGrad)
    grad.settle, grad.follow, grad.place, grad.answer = settle, follow, place, answer
    return grad


def pending_grad(view: torch.Tensor, param: torch.nn.Parameter, settle: Callable[[], None]) -> PendingGrad:
    """``view`` as a gradient of ``param`` that calls ``settle`` before its values are read or written."""
    grad = torch.Tensor._make_subclass(PendingGrad, view)
    grad.settle, grad.plain, grad.of = settle, view, weakref.ref(param)
    return grad
