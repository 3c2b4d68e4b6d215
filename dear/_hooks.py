"""The places where a model or an optimizer is entered from outside, and what must be finished or refused there.

Module hooks settle a module's parameters before its forward, one wait for each fusion group; that is for speed and
order, since any other reader waits too (Note [Pending parameters]).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear._pending import Pending

# What is put before methods of a module's own: Python asks an instance before its class.
GUARDED = ("__deepcopy__", "__reduce_ex__", "join_hook")


def _refusal(sentence: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(sentence)

    return refuse


def _after_load(tell: Callable[[int], None], number: int, optimizer: Optimizer) -> None:
    tell(number)


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether the module's forward is a compiled graph, in which no hook runs."""
    wrapper = type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch._dynamo")
    return wrapper or getattr(module, "_compiled_call_impl", None) is not None


def settle_parameters(module: torch.nn.Module, args: Any) -> None:
    """A forward pre-hook: a module's parameters are finished before it reads them.

    Compiled code must meet finished parameters only, or its guards would see their classes change: what is compiled
    below a module, and what a compiled module holds, is finished here too.
    """
    if torch.compiler.is_compiling():
        return
    for param in module._parameters.values():
        if isinstance(param, Pending):
            param._settle()
    for child in module._modules.values():
        if child is not None and _is_compiled(child):
            settle_all(child)


def settle_all(module: torch.nn.Module) -> None:
    """Finishes every parameter of the module and of those below it."""
    for param in module.parameters():
        if isinstance(param, Pending):
            param._settle()


class Hooks:
    """Everything the engine hangs on a model and an optimizer, so that it can all be taken off again."""

    def __init__(self, model: DDP) -> None:
        self._model = model
        self._handles: list[Any] = []

    def install(
        self,
        optimizers: Sequence[Optimizer],
        *,
        before_forward: Callable[[], None],
        after_forward: Callable[[bool], None],
        before_export: Callable[[], None],
        before_load: Callable[[], None],
        after_load: Callable[[int], None],
    ) -> None:
        """Puts them on. ``after_forward`` is told whether the pass failed; the last three are of the optimizers'
        ``state_dict()`` and ``load_state_dict()``, the last one is told which optimizer has loaded."""

        def before(module: torch.nn.Module, args: Any) -> None:
            before_forward()

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            after_forward(output is None)

        def before_load_model(module: Any, state: Any, prefix: str, local_metadata: Any, *_: Any) -> None:
            if local_metadata.get("assign_to_params_buffers"):
                raise RuntimeError(
                    "load_state_dict(assign=True) would put parameters into the model that neither DDP nor the "
                    "optimizer knows: leave assign=True out."
                )

        keep = self._handles.append
        keep(self._model.register_forward_pre_hook(before, prepend=True))
        keep(self._model.register_forward_hook(after, always_call=True))
        for module in self._model.module.modules():
            keep(module.register_forward_pre_hook(settle_parameters, prepend=True))
        for module in self._model.modules():
            keep(module.register_load_state_dict_pre_hook(before_load_model))
            self._guard(module)
        for number, optimizer in enumerate(optimizers):
            keep(optimizer.register_state_dict_pre_hook(lambda _: before_export()))
            keep(optimizer.register_load_state_dict_pre_hook(lambda _, __: before_load()))
            keep(optimizer.register_load_state_dict_post_hook(functools.partial(_after_load, after_load, number)))
        self._model.__dict__["__deepcopy__"] = _refusal(
            "A deep copy of this DDP module would lose its communication hook without a word: copy model.module, or "
            "call engine.detach() first."
        )
        self._model.__dict__["join_hook"] = _refusal(
            "model.join() cannot be used with dear.attach(), whose exchanges need every rank: give all ranks the same "
            "number of batches, or call engine.detach() first."
        )

    def _guard(self, module: torch.nn.Module) -> None:
        def copy_without_hooks(memo: Any) -> Any:
            taken = self._take_off(module)
            try:
                return copy.deepcopy(module, memo)
            finally:
                for registry, entries in taken:
                    registry.update(entries)

        module.__dict__["__deepcopy__"] = copy_without_hooks
        module.__dict__["__reduce_ex__"] = _refusal(
            "A module under dear.attach() cannot be pickled: save its state_dict(), or call engine.detach() first."
        )

    def _take_off(self, root: torch.nn.Module) -> list[tuple[Any, Any]]:
        """Removes this engine's hooks and methods from all modules below ``root``; returns what to put back."""
        ours = {handle.id for handle in self._handles}
        taken: list[tuple[Any, Any]] = []
        for module in root.modules():
            for name in ("_forward_pre_hooks", "_load_state_dict_pre_hooks"):
                registry = getattr(module, name)
                taken.append((registry, {key: registry.pop(key) for key in list(registry) if key in ours}))
            methods = {name: module.__dict__.pop(name) for name in GUARDED if name in module.__dict__}
            taken.append((module.__dict__, methods))
        return taken

    def remove(self) -> None:
        """Takes everything off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for module in self._model.modules():
            for name in GUARDED:
                module.__dict__.pop(name, None)
