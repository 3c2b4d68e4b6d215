"""The places where a model or an optimizer is entered from outside, and what must be finished before."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _C
from dear._observe import plan_waits

if TYPE_CHECKING:
    from dear.engine import Engine


class ModelHooks:
    """Everything the engine hangs on a model and an optimizer, so that it can all be taken off again."""

    def __init__(self, model: DDP, scheduler: _C.Scheduler, engine: Engine) -> None:
        self._model, self._scheduler, self._engine = model, scheduler, engine
        self._handles: list[Any] = []
        self._waits: list[Any] = []
        self.exporting = False  # the full optimizer state is in place, so state_dict() may run

    def install(self, optimizer: Optimizer, sharded: bool) -> None:
        """Puts the hooks on that stay; those that wait for groups come with :meth:`set_waits`."""
        engine = self._engine

        def finish(*_: Any) -> None:
            engine.synchronize()

        def before(module: torch.nn.Module, args: Any) -> None:
            engine.before_forward()

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            engine.after_forward()

        self._handles.append(self._model.register_forward_pre_hook(before, prepend=True))
        self._handles.append(self._model.register_forward_hook(after, always_call=True))
        for module in self._model.modules():
            self._handles.append(module.register_state_dict_pre_hook(finish))
            self._handles.append(module.register_load_state_dict_pre_hook(finish))

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

        # copy.deepcopy asks the instance first.
        def refuse(memo: Any) -> Any:
            raise RuntimeError(
                "A deep copy of this DDP module would lose its communication hook without a word: copy model.module, "
                "or call engine.detach() first."
            )

        def copy_finished(memo: Any) -> Any:
            engine.synchronize()
            inner = self._model.module
            keep = inner.__dict__.pop("__deepcopy__")
            taken = self._take_off(inner)
            try:
                return copy.deepcopy(inner, memo)
            finally:
                inner.__dict__["__deepcopy__"] = keep
                for registry, entries in taken:
                    registry.update(entries)

        self._model.__dict__["__deepcopy__"] = refuse
        self._model.module.__dict__["__deepcopy__"] = copy_finished

    def _take_off(self, root: torch.nn.Module) -> list[tuple[Any, Any]]:
        """Removes this engine's hooks from all modules below ``root``; returns what to put back."""
        ours = {handle.id for handle in self._handles + self._waits}
        taken = []
        for module in root.modules():
            for name in ("_forward_pre_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
                registry = getattr(module, name)
                entries = {key: registry.pop(key) for key in list(registry) if key in ours}
                taken.append((registry, entries))
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
        self._model.__dict__.pop("__deepcopy__", None)
        self._model.module.__dict__.pop("__deepcopy__", None)
