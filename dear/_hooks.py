"""The places where a model or an optimizer is entered from outside, and what must be finished before."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _C
from dear._observe import plan_waits

if TYPE_CHECKING:
    from dear._schedule import Schedule


# Note [Guarded methods]
# Python asks an instance before its class, copy.deepcopy and pickle included. named_parameters() is what parameters()
# and so an average of the weights go through, _apply() is to(), cpu(), half() and their like. zero_grad() goes through
# parameters() too, but reads none, and must not wait.
GUARDED = ("__deepcopy__", "__reduce_ex__", "named_parameters", "_apply", "zero_grad", "join_hook")


def _refusal(sentence: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(sentence)

    return refuse


class ModelHooks:
    """Everything the engine hangs on a model and an optimizer, so that it can all be taken off again."""

    def __init__(self, model: DDP, scheduler: _C.Scheduler, engine: Schedule) -> None:
        self._model, self._scheduler, self._engine = model, scheduler, engine
        self._handles: list[Any] = []
        self._waits: list[Any] = []
        self._quiet = False  # parameters are listed, not read
        self.exporting = False  # the full optimizer state is in place, so state_dict() may run

    def install(self, optimizer: Optimizer, sharded: bool) -> None:
        """Puts the hooks on that stay; those that wait for groups come with :meth:`set_waits`."""
        engine = self._engine

        def finish(*_: Any) -> None:
            engine.synchronize()

        def before_load_model(module: Any, state: Any, prefix: str, local_metadata: Any, *_: Any) -> None:
            if local_metadata.get("assign_to_params_buffers"):
                raise RuntimeError(
                    "load_state_dict(assign=True) would put parameters into the model that neither DDP nor the "
                    "optimizer knows: leave assign=True out."
                )
            engine.synchronize()

        def before(module: torch.nn.Module, args: Any) -> None:
            engine.before_forward()

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            engine.after_forward(failed=output is None)

        self._handles.append(self._model.register_forward_pre_hook(before, prepend=True))
        self._handles.append(self._model.register_forward_hook(after, always_call=True))
        for module in self._model.modules():
            self._handles.append(module.register_state_dict_pre_hook(finish))
            self._handles.append(module.register_load_state_dict_pre_hook(before_load_model))

        def before_export(_: Optimizer) -> None:
            engine.synchronize()
            if sharded and not self.exporting:
                raise RuntimeError(
                    "The optimizer's state is held in shards, so optimizer.state_dict() has only a part: call "
                    "engine.state_dict() on every rank, and save its result."
                )

        def before_load(_: Optimizer, state: Any) -> None:
            engine.synchronize()

        self._handles.append(optimizer.register_state_dict_pre_hook(before_export))
        self._handles.append(optimizer.register_load_state_dict_pre_hook(before_load))
        self._handles.append(optimizer.register_load_state_dict_post_hook(lambda _: engine.state_was_loaded()))

        for module in self._model.modules():
            self._guard(module)
        self._model.__dict__["__deepcopy__"] = _refusal(
            "A deep copy of this DDP module would lose its communication hook without a word: copy model.module, or "
            "call engine.detach() first."
        )
        self._model.__dict__["join_hook"] = _refusal(
            "model.join() cannot be used with dear.attach(), whose exchanges need every rank: give all ranks the same "
            "number of batches, or call engine.detach() first."
        )

    def _guard(self, module: torch.nn.Module) -> None:
        """Puts methods before the module's own: those that read parameters wait first. See Note [Guarded methods]."""
        engine, kind = self._engine, type(module)

        def copy_finished(memo: Any) -> Any:
            engine.synchronize()
            taken = self._take_off(module)
            try:
                return copy.deepcopy(module, memo)
            finally:
                for registry, entries in taken:
                    registry.update(entries)

        def finished(name: str) -> Any:
            @functools.wraps(getattr(kind, name))
            def method(*args: Any, **kwargs: Any) -> Any:
                if not self._quiet:
                    engine.synchronize()
                return getattr(kind, name)(module, *args, **kwargs)

            return method

        def zero_grad(set_to_none: bool = True) -> None:
            self._quiet = True
            try:
                kind.zero_grad(module, set_to_none)
            finally:
                self._quiet = False

        module.__dict__.update(
            __deepcopy__=copy_finished,
            __reduce_ex__=_refusal(
                "A module under dear.attach() cannot be pickled: save its state_dict(), or call engine.detach() first."
            ),
            named_parameters=finished("named_parameters"),
            _apply=finished("_apply"),
            zero_grad=zero_grad,
        )

    def _take_off(self, root: torch.nn.Module) -> list[tuple[Any, Any]]:
        """Removes this engine's hooks and methods from all modules below ``root``; returns what to put back."""
        ours = {handle.id for handle in self._handles + self._waits}
        taken: list[tuple[Any, Any]] = []
        for module in root.modules():
            for name in ("_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
                registry = getattr(module, name)
                entries = {key: registry.pop(key) for key in list(registry) if key in ours}
                taken.append((registry, entries))
            methods = {name: module.__dict__.pop(name) for name in GUARDED if name in module.__dict__}
            taken.append((module.__dict__, methods))
        return taken

    def set_waits(
        self,
        reads: dict[torch.nn.Module, set[torch.nn.Parameter]],
        group_of: dict[torch.nn.Parameter, int],
        order: list[int],
    ) -> None:
        """Makes each module wait for the fusion groups it reads from; without observed reads, the root for all."""
        for handle in self._waits:
            handle.remove()
        self._waits = []
        root = self._model.module
        waits = plan_waits(root, reads) if reads else {root: None}
        for module, params in waits.items():
            wanted = set(order) if params is None else {group_of[param] for param in params if param in group_of}
            groups = [index for index in order if index in wanted]
            if not groups:
                continue
            hook: Any = _C.GroupWait(self._scheduler, groups)
            if self._engine.update == "replicated":
                hook = self._settle_hook(groups)
            self._waits.append(module.register_forward_pre_hook(hook, prepend=True))

    def _settle_hook(self, groups: list[int]) -> Any:
        engine = self._engine

        def settle(module: torch.nn.Module, args: Any) -> None:
            engine.settle(groups)

        return settle

    def remove(self) -> None:
        """Takes everything off."""
        for handle in self._handles + self._waits:
            handle.remove()
        self._handles, self._waits = [], []
        for module in self._model.modules():
            for name in GUARDED:
                module.__dict__.pop(name, None)
