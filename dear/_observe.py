"""Which module reads which parameter, and in what order: seen once, in a real forward pass.

Note [Who waits for a parameter]
A module waits for its own parameters. But a parameter may be read by another one: nn.MultiheadAttention reads its
out_proj's weight, a tied head reads the embedding's, and any forward may say F.linear(x, self.child.weight). So one
forward pass is watched at the level of tensor operations, and whichever module is innermost when a parameter is read
waits for it too. A module that did not run in that pass waits for everything when it does run. What is left, a read
that a known module makes only later, shows in autograd's version counter (see Scheduler::wait_gathered).
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle


class _Reads(TorchDispatchMode):
    """Reports every operation's parameter arguments; views and aliases count, by the memory they point into."""

    def __init__(self, params: Iterable[torch.nn.Parameter], watch: ForwardWatch) -> None:
        super().__init__()
        spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), p) for p in params if p.numel())
        self._starts = [start for start, _, _ in spans]
        self._spans = spans
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_iter((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.numel():
                pointer = value.data_ptr()
                at = bisect.bisect_right(self._starts, pointer) - 1
                if at >= 0 and pointer < self._spans[at][1]:
                    self._watch.saw(self._spans[at][2])
        return func(*args, **kwargs)


class ForwardWatch:
    """Watches one forward pass of ``root``. ``finished`` tells when it is over, ``complete`` that it did not fail."""

    def __init__(self, root: torch.nn.Module, params: Iterable[torch.nn.Parameter]) -> None:
        self.finished = False
        self.complete = False  # the pass went through to its end
        self.order: dict[torch.nn.Parameter, int] = {}
        self.reads: dict[torch.nn.Module, set[torch.nn.Parameter]] = {}
        self._root = root
        self._stack: list[torch.nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._mode = _Reads(params, self)
        for module in root.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._mode.__enter__()

    def saw(self, param: torch.nn.Parameter) -> None:
        """Notes that the innermost running module reads ``param``."""
        self.order.setdefault(param, len(self.order))
        self.reads.setdefault(self._stack[-1] if self._stack else self._root, set()).add(param)

    def _enter(self, module: torch.nn.Module, args: Any) -> None:
        self._stack.append(module)
        self.reads.setdefault(module, set())

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        while self._stack and self._stack.pop() is not module:
            pass
        if module is self._root:
            self.complete = output is not None
            self.close()

    def close(self) -> None:
        """Stops watching; may be called more than once."""
        if not self.finished:
            self.finished = True
            self._mode.__exit__(None, None, None)
            for handle in self._handles:
                handle.remove()


def _compiled_in_place(module: torch.nn.Module) -> bool:
    """Whether module.compile() was called: its hooks are part of the graph."""
    return getattr(module, "_compiled_call_impl", None) is not None


def _compiled_wrapper(module: torch.nn.Module) -> bool:
    """Whether this is what torch.compile(module) returns: its own hooks run outside the graph."""
    return type(module).__name__ == "OptimizedModule" and type(module).__module__.startswith("torch._dynamo")


def plan_waits(
    root: torch.nn.Module, reads: dict[torch.nn.Module, set[torch.nn.Parameter]]
) -> dict[torch.nn.Module, set[torch.nn.Parameter] | None]:
    """For each module that must wait: the parameters it waits for, or None for all of them.

    For a compiled module everything below it is waited for outside, since hooks inside would break its graph.
    """
    waits: dict[torch.nn.Module, set[torch.nn.Parameter] | None] = {}

    def visit(module: torch.nn.Module) -> None:
        if _compiled_wrapper(module):
            waits[module] = set(module.parameters())
            return
        wanted = set(module.parameters(recurse=False)) | reads.get(module, set())
        for child in module.children():
            if _compiled_in_place(child):
                wanted |= set(child.parameters())
            else:
                visit(child)
        if module not in reads and any(True for _ in module.parameters()):
            waits[module] = None
        elif wanted:
            waits[module] = wanted

    visit(root)
    return waits
