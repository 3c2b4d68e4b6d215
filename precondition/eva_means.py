"""Means over a step of what layers see: of their inputs, and of the gradients of their outputs.

What a mean of output gradients is: Note [The mean gradient of the outputs] in ``eva_reference.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from precondition._layers import Layer
from precondition.eva_parts import Matrix, Vectors


class Shaped(Protocol):
    """A layer, or whatever else has a weight that is a matrix."""

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    blocks: int


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


def input_sum(layer: Layer, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The sum of the rows of an input [groups, columns], in the order of the weight's memory, and how many they are.

    A convolution's patches are not laid out: all samples are summed first, and then the windows of that one image.
    """
    if x.dim() == layer.row_dims + 1:  # the first dimension is that of samples
        samples = x.shape[0]
        x = x.sum(0, keepdim=True, dtype=dtype)
    else:
        samples, x = 1, x.to(dtype)
    windows = layer.windows(x)
    dims = list(range(layer.row_dims))
    rows = samples * windows.shape[: layer.row_dims].numel()
    sums = windows.sum(dims)  # [groups, the weight's dimensions but the first]
    return sums.permute(0, *memory_order(layer.weight)).reshape(layer.blocks, -1), rows


def output_sum(layer: Layer, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the gradients of an output over samples and positions, [groups × rows]."""
    channels = grad.dim() - layer.row_dims
    return grad.sum([dim for dim in range(grad.dim()) if dim != channels], dtype=dtype)


class Means:
    """What the layers of this rank have seen since the last step, for one message of their means.

    The message is flat. It says of each layer whether this rank has used it; then come the mean inputs of all layers
    (Note [Flat vectors] in ``eva_parts.py``), then, ``with_rows``, their mean output gradients. A layer that the rank
    has not used, or whose means are not finite, says zeros.
    """

    def __init__(
        self, layers: Sequence[Layer], vectors: Vectors, with_rows: bool, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        self._layers, self._vectors, self._with_rows = list(layers), vectors, with_rows
        self._scaler = scaler  # of the loss, and so of the outputs' gradients
        self._inputs: dict[Layer, Tensor] = {}  # as reduce() gives them
        self._outputs: dict[Layer, Tensor] = {}
        self._pass: dict[Layer, int] = {}  # the last backward pass of each

    def reduce(self, layer: Layer, x: Tensor) -> Tensor:
        """What is needed of an input: the sum of its rows, and behind it how many they are."""
        sums, rows = input_sum(layer, x, self._vectors.dtype)
        return torch.cat([sums.flatten(), sums.new_full((1,), rows)])

    def see(self, layer: Layer, reduced: Tensor, grad: Tensor) -> None:
        """A layer's :meth:`reduce`-d input and the gradient of its output, of one forward pass."""
        running = torch._C._current_graph_task_id()
        if layer.weight.grad is None and self._pass.get(layer, running) != running:
            self._inputs.pop(layer, None)  # earlier passes were given up by zero_grad()
            self._outputs.pop(layer, None)
        self._pass[layer] = running
        self._inputs[layer] = self._inputs[layer] + reduced if layer in self._inputs else reduced
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
        message = vectors.zeros(len(self._layers) + vectors.columns + self._with_rows * vectors.rows)
        flags, columns, rows = self.parts(message)
        used = [index for index, layer in enumerate(self._layers) if layer in self._inputs]
        if not used:
            return message
        flags.copy_(torch.tensor([float(layer in self._inputs) for layer in self._layers]))
        inputs = [self._inputs[self._layers[index]] for index in used]
        targets = [vectors.column_part(columns, index).view(-1) for index in used]
        torch._foreach_copy_(targets, [each[:-1] for each in inputs])
        torch._foreach_div_(targets, [each[-1] for each in inputs])
        if self._with_rows:
            targets = [vectors.row_part(rows, index).view(-1) for index in used]
            torch._foreach_copy_(targets, [self._outputs[self._layers[index]] for index in used])
            if self._scaler is not None:
                rows.div_(self._scaler.scale(rows.new_ones(())))
        magnitude = vectors.sum_columns(columns.abs())
        if self._with_rows:
            magnitude = magnitude + vectors.sum_rows(rows.abs())
        finite = vectors.sum_blocks(magnitude).isfinite()
        flags.mul_(finite)
        others = ~vectors.to_blocks(finite)
        columns.masked_fill_(vectors.to_columns(others), 0.0)
        if self._with_rows:
            rows.masked_fill_(vectors.to_rows(others), 0.0)
        return message

    def parts(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parts of a message: flags [layers], columns, rows (empty without them)."""
        layers, columns = len(self._layers), self._vectors.columns
        return message[:layers], message[layers : layers + columns], message[layers + columns :]


class Running:
    """The running means of all layers: a preconditioner's state. Equal on all ranks.

    ``known`` says of each layer whether it has any: the first mean is taken as it is.
    """

    def __init__(self, layers: Sequence[Shaped], vectors: Vectors, with_rows: bool) -> None:
        self._layers, self._vectors = list(layers), vectors
        self.columns = vectors.zeros(vectors.columns)
        self.rows = vectors.zeros(with_rows * vectors.rows)
        self.known = vectors.zeros(len(self._layers))

    def update(self, used: Tensor, columns: Tensor, rows: Tensor, decay: float) -> None:
        """New means of all layers.

        used: the fraction of the ranks that used each layer; where it is 0 nothing changes. ``columns`` are averages
        over all ranks, where the others said zeros, and so are divided by it. ``rows`` are not: a rank that did not use
        a layer has added nothing to its gradient, either. What is not finite there counts as 0.
        """
        vectors = self._vectors
        weights = vectors.to_blocks((1 - decay * self.known) * (used > 0))
        counts = vectors.to_columns(vectors.to_blocks(used + (used <= 0)))
        self.columns.lerp_((columns / counts).nan_to_num(0.0, 0.0, 0.0), vectors.to_columns(weights))
        if len(rows):
            self.rows.lerp_(rows.nan_to_num(0.0, 0.0, 0.0), vectors.to_rows(weights))
        self.known.copy_((self.known > 0) | (used > 0))

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """By the name of each layer that has any: the mean input ``a`` [groups, the weight's shape but the first
        dimension] and the mean output gradient ``b`` [outputs]. They are copies."""
        found = {}
        for index, (layer, known) in enumerate(zip(self._layers, self.known.tolist(), strict=True)):
            if known:
                state = {"a": self._input_of(index, layer).clone()}
                if len(self.rows):
                    state["b"] = self._vectors.row_part(self.rows, index).flatten()
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
                part = self._vectors.row_part(self.rows, index)
                part.copy_(means["b"].view_as(part))
            self.known[index] = 1.0

    def _input_of(self, index: int, layer: Shaped) -> Tensor:
        """A layer's mean input as a view, in the order of the weight's dimensions."""
        order = memory_order(layer.weight)
        part = self._vectors.column_part(self.columns, index)
        part = part.view(layer.blocks, *(layer.weight.shape[dim] for dim in order))
        return part.permute(0, *(1 + order.index(dim) for dim in range(1, layer.weight.dim())))
