"""Means over a step of what layers see: of their inputs, and of the gradients of their outputs.

What a mean of output gradients is: Note [The mean gradient of the outputs] in ``eva_reference.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dear import _C
from precondition._capture import Capture
from precondition._layers import Layer
from precondition._loss_scale import loss_scale
from precondition.eva_parts import Matrix, Vectors, to_device


class Shaped(Protocol):
    """A layer, or whatever else has a weight that is a matrix."""

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    blocks: int

    @property
    def params(self) -> tuple[nn.Parameter, ...]: ...


def matrix_of(layer: Shaped) -> Matrix:
    """The shape of its gradient."""
    rows = layer.weight.shape[0] // layer.blocks
    return Matrix(layer.blocks, rows, math.prod(layer.weight.shape[1:]), layer.bias is not None)


def memory_order(weight: nn.Parameter) -> list[int]:
    """The dimensions of a weight but the first, the one with the longest steps in memory first."""
    strides = weight.stride()
    return sorted(range(1, weight.dim()), key=lambda dim: (-strides[dim], dim))


def lies_by_rows(layer: Shaped) -> bool:
    """Whether each output's part of the weight is a run of memory, which comes after the last output's."""
    weight = layer.weight.detach().permute(0, *memory_order(layer.weight))
    return weight.numel() > 0 and weight.is_contiguous()


def input_mean(layer: Layer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean row of an input [groups × columns], in the order of the weight's memory."""
    mean, order = layer.mean_row(x, dtype), memory_order(layer.weight)
    if order == list(range(1, layer.weight.dim())):
        return mean
    return mean.view(layer.blocks, *layer.weight.shape[1:]).permute(0, *order).reshape(-1)


def output_sum(layer: Layer, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the gradients of an output over samples and positions, [groups × rows]."""
    channels = grad.dim() - layer.row_dims
    return grad.sum([dim for dim in range(grad.dim()) if dim != channels], dtype=dtype)


class Means:
    """What the layers of this rank have seen since the last step, for one message of their means.

    The message is flat. It says of each layer whether this rank has used it; then come the mean inputs of all layers
    (Note [Flat vectors] in ``eva_parts.py``), then, ``with_rows``, their mean output gradients. A layer that the rank
    has not used says zeros. If any of its means is not finite, all say so.

    A mean input is the mean over the passes of the means over rows, as the loss of a step is of theirs.
    """

    def __init__(
        self, layers: Sequence[Layer], vectors: Vectors, with_rows: bool, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self._layers, self._vectors, self._with_rows = list(layers), vectors, with_rows
        self._scaler = scaler  # of the loss, and so of the outputs' gradients
        self._inputs: dict[Layer, list[Tensor]] = {}  # by pass
        self._outputs: dict[Layer, Tensor] = {}
        self._pass: dict[Layer, int] = {}  # the last backward pass of each
        self._capture = Capture(self.see, self.reduce)

    def watch(self) -> None:
        """Puts the hooks on the layers."""
        self._capture.watch(self._layers)

    def release(self) -> None:
        """Takes them off."""
        self._capture.release()

    def reduce(self, layer: Layer, x: Tensor) -> Tensor:
        """What is needed of an input."""
        return input_mean(layer, x, self._vectors.dtype)

    def see(self, layer: Layer, reduced: Tensor, grad: Tensor) -> None:
        """A layer's :meth:`reduce`-d input and the gradient of its output, of one forward pass."""
        running = torch._C._current_graph_task_id()
        if layer.weight.grad is None and self._pass.get(layer, running) != running:
            self._inputs.pop(layer, None)  # earlier passes were given up by zero_grad()
            self._outputs.pop(layer, None)
        self._pass[layer] = running
        self._inputs.setdefault(layer, []).append(reduced)
        if self._with_rows:
            sums = output_sum(layer, grad, self._vectors.dtype)
            self._outputs[layer] = self._outputs[layer] + sums if layer in self._outputs else sums

    def forget(self) -> None:
        """A step has used what was seen."""
        self._inputs.clear()
        self._outputs.clear()
        self._pass.clear()

    def message(self) -> Tensor:
        """This rank's message."""
        vectors = self._vectors
        matrices, layers = vectors.matrices, self._layers
        if not self._inputs:
            return vectors.zeros(len(layers) + vectors.columns + self._with_rows * vectors.rows)
        flags = [float(layer in self._inputs) for layer in layers]
        means = [self._mean_input(layer, each) for layer, each in zip(layers, matrices, strict=True)]
        sums: list[Tensor] = []
        if self._with_rows:
            sums = [
                self._outputs[layer] if layer in self._outputs else vectors.zeros(each.groups * each.rows)
                for layer, each in zip(layers, matrices, strict=True)
            ]
        scale = loss_scale(self._scaler, sums[0]) if sums else None
        if scale is not None:
            sums = [each / scale for each in sums]
        if torch.device(vectors.device).type == "cpu":
            return _C.finite_message(flags, [*means, *sums])
        message = torch.cat([to_device(flags, vectors.dtype, vectors.device), *means, *sums])
        return message.masked_fill_(~message.sum().isfinite(), 0.0)

    def _mean_input(self, layer: Layer, matrix: Matrix) -> Tensor:
        """Over the passes."""
        seen = self._inputs.get(layer)
        if seen is None:
            return self._vectors.zeros(matrix.groups * matrix.columns)
        return seen[0] if len(seen) == 1 else torch.stack(seen).mean(0)

    def parts(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of a message: flags [layers], columns, rows (empty without them)."""
        layers, columns = len(self._layers), self._vectors.columns
        return message[:layers], message[layers : layers + columns], message[layers + columns :]


class Running:
    """The running means of all layers: a preconditioner's state. Equal on all ranks.

    ``known`` says of each layer whether it has any: the first mean is taken as it is.
    """

    def __init__(self, layers: Sequence[Shaped], with_rows: bool, device: torch.device) -> None:
        wide = any(layer.weight.dtype == torch.float64 for layer in layers)
        dtype = torch.float64 if wide else torch.float32
        self._layers = list(layers)
        self.vectors = vectors = Vectors([matrix_of(layer) for layer in layers], dtype, device)
        self.columns = vectors.zeros(vectors.columns)
        self.rows = vectors.zeros(with_rows * vectors.rows)
        self.known = vectors.zeros(len(self._layers))

    def update(self, used: Tensor, columns: Tensor, rows: Tensor, decay: float) -> None:
        """New means of all layers.

        used: the fraction of the ranks that used each layer; where it is 0 nothing changes. ``columns`` are averages
        over all ranks, where the others said zeros, and so are divided by it. ``rows`` are not: a rank that did not use
        a layer has added nothing to its gradient, either. What is not finite there counts as 0.
        """
        vectors = self.vectors
        if self.known.is_cpu:
            places = vectors.first_column, vectors.first_row
            _C.update_means(self.columns, self.rows, self.known, used, columns, rows, *places, decay)
            return
        share = (1 - decay * self.known) * (used > 0)
        means = columns / vectors.to_all_columns(used + (used <= 0))
        self.columns.lerp_(means.nan_to_num_(0.0, 0.0, 0.0), vectors.to_all_columns(share))
        if len(rows):
            self.rows.lerp_(rows.nan_to_num(0.0, 0.0, 0.0), vectors.to_all_rows(share))
        self.known.copy_((self.known > 0) | (used > 0))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """By the name of each layer that has any: the mean input ``a`` [groups, the weight's shape but the first
        dimension] and the mean output gradient ``b`` [outputs]. They are copies."""
        found = {}
        for index, (layer, known) in enumerate(zip(self._layers, self.known.tolist(), strict=True)):
            if known:
                state = {"a": self._input_of(index, layer).clone()}
                if len(self.rows):
                    state["b"] = self.vectors.row_part(self.rows, index).flatten().clone()
                found[layer.name] = state
        return found

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Takes what :meth:`state_dict` gave, of the same layers.

        Raises:
            ValueError: a layer is not among these, or has another shape.
        """
        index_of = {layer.name: index for index, layer in enumerate(self._layers)}
        for name, means in state.items():
            index = index_of.get(name)
            if index is None or means["a"].shape != self._input_of(index, self._layers[index]).shape:
                raise ValueError(
                    f"The preconditioner's state has a layer {name!r} that the model does not have in this shape: load "
                    "the state of a run of the same model."
                )
        self.known.zero_()
        for name, means in state.items():
            index = index_of[name]
            self._input_of(index, self._layers[index]).copy_(means["a"])
            if len(self.rows):
                part = self.vectors.row_part(self.rows, index)
                part.copy_(means["b"].view_as(part))
            self.known[index] = 1.0

    def _input_of(self, index: int, layer: Shaped) -> Tensor:
        """A layer's mean input as a view, in the order of the weight's dimensions."""
        order = memory_order(layer.weight)
        part = self.vectors.column_part(self.columns, index)
        part = part.view(layer.blocks, *(layer.weight.shape[dim] for dim in order))
        return part.permute(0, *(1 + order.index(dim) for dim in range(1, layer.weight.dim())))
