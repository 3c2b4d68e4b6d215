"""What the user's own model takes, layer by layer: forward, backward and update, in a few steps of training.

Hooks of modules and parameters note the time. What a layer waits for its parameters is left out; what is computed
between two layers counts to the second one. Stamps of a GPU are events on its stream, read at the end.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from dear._compiled import is_wrapper

Stamp = Any  # seconds, or an event


class Stopwatch:
    """Hooks on a model, until :meth:`remove`. ``step_began()`` ends a step and begins the next one."""

    def __init__(self, model: DDP, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self.layers = own_layers(model)
        self._spans: list[list[tuple[str, int, Stamp, Stamp]]] = []  # by step: phase, layer, from, until
        self._order: list[int] = []  # of the forward pass
        self._last: Stamp | None = None
        self._under_way = ""  # "forward", "backward" or nothing
        self._handles: list[Any] = [
            model.register_forward_pre_hook(self._model_begins),
            model.register_forward_hook(self._model_ends),
        ]
        compiled = any(is_wrapper(module) or module._compiled_call_impl for module in model.modules())
        # Hooks would have it compiled again, and do not run in it.
        for number, (_, module, params) in enumerate([] if compiled else self.layers):
            # Before this library's own hook, which may wait, and behind it.
            self._handles.append(module.register_forward_pre_hook(partial(self._reaches, number), prepend=True))
            self._handles.append(module.register_forward_pre_hook(partial(self._enters, number)))
            self._handles.append(module.register_forward_hook(partial(self._leaves, number)))
            for param in params:
                self._handles.append(param.register_post_accumulate_grad_hook(partial(self._has_gradient, number)))

    def step_began(self) -> None:
        """A step boundary; what was noted since the last one is a step."""
        self._spans.append([])

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def times(self) -> tuple[list[int], list[float], list[float]]:
        """The layers in the order of the forward pass, and by layer the median seconds of the forward and of the
        backward pass."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        forward, backward = self._medians("forward"), self._medians("backward")
        rest = [number for number in range(len(self.layers)) if number not in self._order]
        return [*self._order, *rest], forward, backward

    def _medians(self, phase: str) -> list[float]:
        steps = []
        for spans in self._spans:
            total = [0.0] * len(self.layers)
            for kind, layer, start, end in spans:
                if kind == phase:
                    total[layer] += _between(start, end)
            if any(kind == phase for kind, *_ in spans):
                steps.append(total)
        if not steps:
            return [0.0] * len(self.layers)
        return [statistics.median(each) for each in zip(*steps, strict=True)]

    # --- hooks ---

    def _now(self) -> Stamp:
        if self._device.type == "cpu":
            return self._clock()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event

    def _note(self, phase: str, layer: int) -> None:
        """What has passed since the last stamp was the layer's."""
        now = self._now()
        if self._last is not None and self._spans:
            self._spans[-1].append((phase, layer, self._last, now))
        self._last = now

    def _model_begins(self, model: nn.Module, inputs: Any) -> None:
        self._under_way, self._last = "forward" if torch.is_grad_enabled() else "", None

    def _model_ends(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if self._under_way == "forward" and self._order:
            self._note("forward", self._order[-1])
            self._under_way = "backward"

    def _reaches(self, number: int, module: nn.Module, inputs: Any) -> None:
        if self._under_way == "forward":
            if number not in self._order:
                self._order.append(number)
            self._note("forward", number)

    def _enters(self, number: int, module: nn.Module, inputs: Any) -> None:
        if self._under_way == "forward":
            self._last = self._now()

    def _leaves(self, number: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._under_way == "forward":
            self._note("forward", number)

    def _has_gradient(self, number: int, param: torch.Tensor) -> None:
        if self._under_way == "backward":
            self._note("backward", number)


def own_layers(model: DDP) -> list[tuple[str, nn.Module, list[nn.Parameter]]]:
    """Modules with trained parameters of their own; one that several share counts once."""
    seen: set[nn.Parameter] = set()
    found = []
    for name, module in model.module.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and p not in seen]
        seen.update(own)
        if own:
            found.append((name or "model", module, own))
    return found


def _between(start: Stamp, end: Stamp) -> float:
    if isinstance(start, float):
        return float(end - start)
    return float(start.elapsed_time(end)) / 1e3
