"""Means of host tensors, by native code: no Python in the backward pass, and little in the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dear import _C
from precondition._capture import outside_of_graphs
from precondition._layers import ConvLayer, Layer
from precondition._loss_scale import loss_scale
from precondition.eva_means import Means, memory_order
from precondition.eva_parts import Vectors

Side = tuple[int, int, int, int, int]  # padding before and after, a window's size and step, and their stride


class HostMeans(Means):
    """As :class:`Means`. What counts is that of Note [What counts] in ``_capture.py``."""

    def __init__(
        self, layers: Sequence[Layer], vectors: Vectors, with_rows: bool, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        super().__init__(layers, vectors, with_rows, scaler)
        places = [
            (
                layer.weight, vectors.first_column[index], vectors.first_row[index], _sides(layer), _padding(layer),
                _order(layer), layer.blocks,
            )
            for index, layer in enumerate(layers)
        ]  # fmt: skip
        self._native = _C.MeanCapture(places, vectors.zeros(0), vectors.columns, vectors.rows if with_rows else 0)
        self._handles: list[Any] = []

    def watch(self) -> None:
        for index, layer in enumerate(self._layers):
            hook = outside_of_graphs(self._after_forward(index))
            self._handles.append(layer.module.register_forward_hook(hook, with_kwargs=True))

    def release(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _after_forward(self, index: int) -> Callable[..., None]:
        see = self._native.see

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if module.training and isinstance(output, Tensor) and output.requires_grad:
                see(index, args[0] if args else kwargs["input"], output)

        return after

    def forget(self) -> None:
        self._native.forget()

    def message(self) -> Tensor:
        scale = loss_scale(self._scaler, torch.empty(0))
        return self._native.message(1.0 if scale is None else float(scale))


def _sides(layer: Layer) -> list[Side]:
    """Of a convolution."""
    if not isinstance(layer, ConvLayer):
        return []
    conv = layer.module
    padding = conv._reversed_padding_repeated_twice
    columns = padding[-2::-2], padding[::-2], conv.kernel_size, conv.dilation, conv.stride
    return list(zip(*columns, strict=True))


def _padding(layer: Layer) -> str:
    """What the sides are padded with, as ``torch.nn.functional.pad`` calls it."""
    mode = layer.module.padding_mode if isinstance(layer, ConvLayer) else "zeros"
    return "constant" if mode == "zeros" else str(mode)


def _order(layer: Layer) -> list[int]:
    """Of [groups, the weight's dimensions but the first] in memory, where it is not this one."""
    order = memory_order(layer.weight)
    return [] if order == sorted(order) else [0, *order]
