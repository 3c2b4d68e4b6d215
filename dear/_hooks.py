"""The places where a model or an optimizer is entered from outside, and what must be finished or refused there.

Module hooks settle a module's parameters before its forward, one wait for each fusion group; that is for speed and
order, since any other reader waits too (Note [Pending parameters]).
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear._compiled import enter, is_wrapper, leave, settle_all, stand_in_front, step_aside
from dear._pending import Pending, settle

# What is put before methods of a module's own: Python asks an instance before its class.
GUARDED = (
    "__deepcopy__", "__reduce_ex__", "join_hook", "register_comm_hook", "_register_builtin_comm_hook", "compile",
    "__prepare_scriptable__",
)  # fmt: skip


def _refusal(sentence: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(sentence)

    return refuse


def _after_load(tell: Callable[[int], None], number: int, optimizer: Optimizer) -> None:
    tell(number)


def settle_parameters(module: torch.nn.Module, args: Any) -> None:
    """A forward pre-hook: a module's parameters are finished before it reads them."""
    if torch.compiler.is_compiling():  # somebody stood in front, see Note [Compiled code]
        return
    for param in module._parameters.values():
        if isinstance(param, Pending):
            settle(param)


def settle_before_compiled(module: torch.nn.Module, args: Any) -> None:
    """A forward pre-hook of what ``torch.compile(module)`` returned."""
    if not torch.compiler.is_compiling():
        settle_all(module)


def _hookable(root: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules below ``root``. One that torch.jit made takes no such hooks, and has no parameters: others are
    refused."""
    return [module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]


class Hooks:
    """Everything the engine hangs on a model and an optimizer, so that it can all be taken off again."""

    def __init__(self, model: DDP) -> None:
        self._model = model
        self._handles: list[Any] = []

    def install(
        self,
        optimizers: Sequence[Optimizer],
        *,
        before_export: Callable[[], None],
        before_load: Callable[[], None],
        after_load: Callable[[int], None],
    ) -> None:
        """Puts on what is called at the optimizers' ``state_dict()`` and ``load_state_dict()``; ``after_load`` is told
        which optimizer has loaded. And refuses or guards what would copy the hooks."""

        def before_load_model(module: Any, state: Any, prefix: str, local_metadata: Any, *_: Any) -> None:
            if local_metadata.get("assign_to_params_buffers"):
                raise RuntimeError(
                    "load_state_dict(assign=True) would put parameters into the model that neither DDP nor the "
                    "optimizer knows: leave assign=True out."
                )

        keep = self._handles.append
        for module in _hookable(self._model):
            keep(module.register_load_state_dict_pre_hook(before_load_model))
            self._guard(module)
        for number, optimizer in enumerate(optimizers):
            keep(optimizer.register_state_dict_pre_hook(lambda _: before_export()))
            keep(optimizer.register_load_state_dict_pre_hook(lambda _, __: before_load()))
            keep(optimizer.register_load_state_dict_post_hook(functools.partial(_after_load, after_load, number)))
        self._model.__dict__["__deepcopy__"] = self._model.__dict__["__reduce_ex__"] = _refusal(
            "A copy of this DDP module would lose its communication hook without a word: copy model.module or save its "
            "state_dict(), or call engine.detach() first."
        )
        for name in ("register_comm_hook", "_register_builtin_comm_hook"):
            self._model.__dict__[name] = _refusal(
                "This DDP module has a communication hook already, dear.attach()'s, and DDP takes only one: pass a "
                "compressor to dear.attach(), or call engine.detach() first."
            )
        self._model.__dict__["join_hook"] = _refusal(
            "model.join() cannot be used with dear.attach(), whose exchanges need every rank: give all ranks the same "
            "number of batches, or call engine.detach() first."
        )

    def watch_forward(self, before: Callable[[], None], after: Callable[[bool], None]) -> None:
        """Puts on what is called around a forward pass; ``after`` is told whether it failed. And has every module wait
        for its parameters."""
        enter(self._model, before, after)
        for module in _hookable(self._model.module):
            hook = settle_before_compiled if is_wrapper(module) else settle_parameters
            self._handles.append(module.register_forward_pre_hook(hook, prepend=True))
            stand_in_front(module)

    def _guard(self, module: torch.nn.Module) -> None:
        def copy_without_hooks(memo: Any) -> Any:
            taken = self._take_off(module)
            try:
                return copy.deepcopy(module, memo)
            finally:
                for registry, entries in taken:
                    registry.update(entries)

        module.__dict__["__deepcopy__"] = copy_without_hooks

        def reduce_for_a_copy(protocol: Any) -> Any:
            if sys._getframe(1).f_globals.get("__name__") == "copy":  # copy.copy() asks an instance for this alone
                return type(module).__reduce_ex__(module, protocol)
            raise RuntimeError(
                "A module under dear.attach() cannot be pickled: save its state_dict(), or call engine.detach() first."
            )

        module.__dict__["__reduce_ex__"] = reduce_for_a_copy
        module.__dict__["__prepare_scriptable__"] = self._without_hooks(module)

    def _without_hooks(self, module: torch.nn.Module) -> Callable[[], torch.nn.Module]:
        """For torch.jit.script(), which would compile hooks with the module: a twin that shares everything else."""

        def twin() -> torch.nn.Module:
            settle_all(module)
            ours = {handle.id for handle in self._handles}
            twin = type(module).__new__(type(module))
            twin.__dict__.update({name: value for name, value in module.__dict__.items() if name not in GUARDED})
            hooks = module._forward_pre_hooks.items()
            twin.__dict__["_modules"] = dict(module._modules)  # which torch fills with the twins of those below
            twin.__dict__["_forward_pre_hooks"] = OrderedDict((key, hook) for key, hook in hooks if key not in ours)
            return twin

        return twin

    def _take_off(self, root: torch.nn.Module) -> list[tuple[Any, Any]]:
        """Removes this engine's hooks and methods from all modules below ``root``; returns what to put back."""
        ours = {handle.id for handle in self._handles}
        taken: list[tuple[Any, Any]] = []
        for module in _hookable(root):
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
        leave(self._model)
        for module in _hookable(self._model):
            for name in GUARDED:
                module.__dict__.pop(name, None)
            step_aside(module)
