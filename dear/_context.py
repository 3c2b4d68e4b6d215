"""The context in which deferred work runs: that of ``optimizer.step()``, not that of whoever happens to wait for it.

Note [Deferred work]
A read of a parameter can come from anywhere: under autocast, in inference mode, inside a functorch transform, while a
model is traced. The update that this read completes belongs to the ``step()`` before it. So work is deferred only from
a :func:`is_ordinary` context, and is done in :func:`ordinary`, which restores one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes


def _function_modes(kind: type, other: bool = False) -> tuple[Any, ...]:
    """The active function modes of this kind, or those of no such kind."""
    if not torch._C._len_torch_function_stack():
        return ()
    return tuple(mode for mode in _get_current_function_mode_stack() if isinstance(mode, kind) != other)


def is_ordinary(device: torch.device) -> bool:
    """Whether a step may leave work for later here: no autocast, inference mode, transform, mode or tracing."""
    return not (
        torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or (device.type != "cpu" and torch.is_autocast_enabled(device.type))
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or _function_modes(DeviceContext, other=True)
    )


@dataclass(frozen=True)
class StepContext:
    """What an ordinary context still leaves open: grad mode, default dtype and device, determinism, stream."""

    device: torch.device
    grad: bool = True
    dtype: torch.dtype = torch.float32
    deterministic: tuple[bool, bool] = (False, False)  # torch.use_deterministic_algorithms: the mode, warn_only
    devices: tuple[Any, ...] = ()  # default devices, as function modes
    stream: Any = None  # of a GPU

    @classmethod
    def here(cls, device: torch.device) -> StepContext:
        """The context of the caller."""
        return cls(
            device,
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
            _function_modes(DeviceContext),
            None if device.type == "cpu" else torch.accelerator.current_stream(device),
        )


@contextlib.contextmanager
def ordinary(context: StepContext) -> Iterator[None]:
    """Runs what is inside in an ordinary context, with what ``context`` leaves open as it was there."""
    before = StepContext.here(context.device)
    if is_ordinary(context.device) and replace(before, grad=context.grad) == context:
        with torch.set_grad_enabled(context.grad):
            yield
        return
    tracing = torch._C._get_tracing_state()
    modes = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    for mode in context.devices:
        _push_mode(mode)
    try:
        if tracing is not None:  # in some contexts it cannot even be set to what it is
            torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        with (
            temporarily_clear_interpreter_stack(),
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.set_grad_enabled(context.grad),
            torch._C._DisableAutocast(),
            _on_stream(context, before),
        ):
            _set(context)
            yield
    finally:
        _set(before)
        for _ in context.devices:
            _pop_mode()
        for mode in reversed(modes):
            _push_mode(mode)
        if tracing is not None:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]


def _set(context: StepContext) -> None:
    torch.set_default_dtype(context.dtype)
    mode, warn_only = context.deterministic
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)


@contextlib.contextmanager
def _on_stream(context: StepContext, caller: StepContext) -> Iterator[None]:
    """On ``context``'s stream: behind the caller's, which has waited for what is worked on, and before what the caller
    does next."""
    if context.stream is None or context.stream == caller.stream:
        yield
        return
    context.stream.wait_stream(caller.stream)
    with context.stream:
        yield
    caller.stream.wait_stream(context.stream)
