"""The operators that a gradient in shards has an answer to: norms, and changes of each element by itself.

They are those of ``torch.nn.utils.clip_grad``, of GradScaler, and of loops that do the same by hand. Everything else is
refused by the placeholder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Number
from typing import Any, Protocol

import torch

from dear._changes import number
from dear._placeholders import LocalGrad


class Gradients(Protocol):
    """Who holds the averages (:class:`dear._sharded_gradients.ShardedGradients`)."""

    def norms(self, grads: list[LocalGrad], order: float) -> list[torch.Tensor]: ...

    def change(
        self, grads: list[LocalGrad], operator: Callable[[list[torch.Tensor]], Any], factor: Any, what: Any
    ) -> None: ...

    def unscale(self, grads: list[LocalGrad], found_inf: torch.Tensor, inv_scale: torch.Tensor) -> None: ...


def answer(gradients: Gradients, func: Any, args: Any, kwargs: Any) -> Any:
    """What plain DDP's gradients would answer, or NotImplemented."""
    handler = _HANDLERS.get(func)
    return NotImplemented if handler is None else handler(gradients, func, list(args), dict(kwargs))


# --- norms ---


def _order(options: dict[str, Any], name: str) -> float | None:
    """The order of a norm over all elements; None where it is another norm, of rows or matrices, or in another type."""
    order = options.pop(name, 2)
    if any(value is not None and value is not False for value in options.values()):
        return None
    if order is None or order == "fro":
        return 2.0
    return float(order) if isinstance(order, Number) else None  # type: ignore[arg-type]


def _norm(gradients: Gradients, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    name = "p" if func in (torch.norm, torch.Tensor.norm) else "ord"
    grad, *rest = args
    if len(rest) > 1 or not isinstance(grad, LocalGrad):
        return NotImplemented
    order = _order({**dict.fromkeys([name] if rest else [], rest[0] if rest else None), **kwargs}, name)
    return NotImplemented if order is None else gradients.norms([grad], order)[0]


def _foreach_norm(gradients: Gradients, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    grads, *rest = args
    if len(rest) > 1:
        return NotImplemented
    order = _order({**dict.fromkeys(["ord"] if rest else [], rest[0] if rest else None), **kwargs}, "ord")
    if order is None:
        return NotImplemented
    local, plain = _split(grads)
    found = iter(gradients.norms(local, order))
    others = iter(func(plain, order) if plain else ())
    return tuple(next(found) if isinstance(grad, LocalGrad) else next(others) for grad in grads)


# --- changes ---


def _split(grads: Iterable[torch.Tensor]) -> tuple[list[LocalGrad], list[torch.Tensor]]:
    """Those in shards, and those that the user has put into ``.grad``."""
    grads = list(grads)
    local = [grad for grad in grads if isinstance(grad, LocalGrad)]
    return local, [grad for grad in grads if not isinstance(grad, LocalGrad)]


def _is_one_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not isinstance(value, LocalGrad) and value.numel() == 1
    return value is None or isinstance(value, Number)


def _factor(func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What the operator multiplies by; None where it does something else."""
    if len(args) != 1 or kwargs:
        return None
    factor = args[0].clone() if isinstance(args[0], torch.Tensor) else args[0]
    if func in _MULTIPLYING:
        return factor
    if func not in _DIVIDING:
        return None
    # As torch divides, where Python refuses 0. A tensor is not asked whether it is one: that would wait for a GPU.
    return 1 / factor if isinstance(factor, torch.Tensor) or factor else math.copysign(math.inf, factor)


def _said(func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """A change in words and numbers; None for one that changes nothing."""
    numbers = [number(value) for value in (*args, *kwargs.values())]
    if numbers == [1] and (func in _MULTIPLYING or func in _DIVIDING):
        return None
    return getattr(func, "__name__", ""), numbers, list(kwargs)


def _change_one(gradients: Gradients, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    grad, *rest = args
    if not isinstance(grad, LocalGrad) or not all(map(_is_one_number, [*rest, *kwargs.values()])):
        return NotImplemented
    gradients.change(
        [grad], lambda parts: [func(part, *rest, **kwargs) for part in parts], _factor(func, rest, kwargs),
        _said(func, rest, kwargs),
    )  # fmt: skip
    return grad


def _change_each(gradients: Gradients, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    grads, *rest = args
    if not all(map(_is_one_number, [*rest, *kwargs.values()])):
        return NotImplemented
    local, plain = _split(grads)
    factor, what = _factor(func, rest, kwargs), _said(func, rest, kwargs)
    gradients.change(local, lambda parts: func(parts, *rest, **kwargs), factor, what)
    if plain:
        func(plain, *rest, **kwargs)
    return None


def _unscale(gradients: Gradients, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    grads, found_inf, inv_scale = args
    local, plain = _split(grads)
    if plain:
        func(plain, found_inf, inv_scale)
    gradients.unscale(local, found_inf, inv_scale)


def _itself(gradients: Gradients, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return args[0]


_Method = torch.Tensor
_MULTIPLYING = {_Method.mul_, _Method.multiply_, _Method.__imul__, torch._foreach_mul_}
_DIVIDING = {_Method.div_, _Method.divide_, _Method.__itruediv__, torch._foreach_div_}
_CLAMPING = {_Method.clamp_, _Method.clip_, _Method.clamp_min_, _Method.clamp_max_}
_EACH = {torch._foreach_mul_, torch._foreach_div_, torch._foreach_clamp_min_, torch._foreach_clamp_max_}
_ONE = (_MULTIPLYING | _DIVIDING | _CLAMPING | {_Method.nan_to_num_, torch.nan_to_num_, torch.clamp_}) - _EACH

_HANDLERS: dict[Any, Callable[[Gradients, Any, list[Any], dict[str, Any]], Any]] = {
    **dict.fromkeys((torch.norm, _Method.norm, torch.linalg.vector_norm), _norm),
    torch._foreach_norm: _foreach_norm,
    **dict.fromkeys(_ONE, _change_one),
    **dict.fromkeys(_EACH, _change_each),
    torch._amp_foreach_non_finite_check_and_unscale_: _unscale,
    **dict.fromkeys((_Method.detach, _Method.data.__get__), _itself),  # type: ignore[attr-defined]
}
