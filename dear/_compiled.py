"""torch.compile around, inside and beside a model under the schedule.

Note [Compiled code]
Compiled code is guarded by the classes of the parameters it reads, and no hook runs in it. So whoever is in front of it
finishes the parameters of all modules in it: the pre-hook of an ``OptimizedModule``, a function in front of what
``module.compile()`` made, or, where DDP itself runs under torch.compile, DDP's own entrance. Blocks that are compiled
one by one so keep the overlap with the forward pass.

Nothing of this library is to be compiled: its entrances are marked as torch marks its own.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel as DDP

from dear._pending import Pending, settle

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """The function, which runs as it is, and so does all that it calls, also where the caller is compiled."""
    if isinstance(function, types.MethodType):  # a mark cannot be put on one

        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return _disable_dynamo(call)  # type: ignore[return-value]
    return _disable_dynamo(function)  # type: ignore[return-value]


def enter(model: DDP, before: Callable[[], None], after: Callable[[bool], None]) -> None:
    """Puts both around DDP's own forward; ``after`` is told whether the pass failed. :func:`leave` takes them off."""
    before, after, finish = uncompiled(before), uncompiled(after), uncompiled(settle_all)

    def forward(self: DDP, *inputs: Any, **kwargs: Any) -> Any:
        before()
        if torch._C._dynamo.eval_frame.get_eval_frame_callback():  # what is called from here is compiled
            finish(self.module)
        failed = True
        try:
            output = type(self).forward(self, *inputs, **kwargs)
            failed = False
        finally:
            after(failed)
        return output

    # It runs as it is, and what it calls is compiled where the caller is: torch.compiler.disable(recursive=False) would
    # compile the function itself.
    torch._dynamo.decorators.skip(forward)
    # A method, so that a copy of the module has one of its own, and guards of compiled code find what they look for.
    model.__dict__["forward"] = types.MethodType(forward, model)


def leave(model: DDP) -> None:
    """Takes back what :func:`enter` did."""
    model.__dict__.pop("forward", None)


def is_wrapper(module: torch.nn.Module) -> bool:
    """Whether the module is what ``torch.compile(module)`` returned, whose hooks run before the compiled code."""
    return type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch._dynamo")


def settle_all(module: torch.nn.Module) -> None:
    """Finishes every parameter of the module and of those below it."""
    for param in module.parameters():
        if isinstance(param, Pending):
            settle(param)


def stand_in_front(module: torch.nn.Module) -> None:
    """What ``module.compile()`` has made, or will make, finishes the module's parameters first."""

    def compile_and_stand_in_front(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        type(self).compile(self, *args, **kwargs)
        _guard(self)

    module.__dict__["compile"] = types.MethodType(compile_and_stand_in_front, module)
    _guard(module)


def step_aside(module: torch.nn.Module) -> None:
    """Takes back what :func:`stand_in_front` did."""
    module.__dict__.pop("compile", None)
    behind = getattr(module._compiled_call_impl, "_dear_behind", None)
    if behind is not None:
        module._compiled_call_impl = behind


def _guard(module: torch.nn.Module) -> None:
    behind = module._compiled_call_impl
    if behind is None:
        return

    @functools.wraps(behind)
    def settle_and_call(*args: Any, **kwargs: Any) -> Any:
        settle_all(module)
        return behind(*args, **kwargs)

    settle_and_call._dear_behind = behind  # type: ignore[attr-defined]
    module._compiled_call_impl = settle_and_call
