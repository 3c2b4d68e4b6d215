"""The Kronecker factors of a layer's curvature: sums of a backward pass, and running averages.

Note [The factors]
Of a layer with input rows a (a 1 appended for the bias) and output gradients g, the curvature is taken to be A ⊗ G with
A = E[a aᵀ] and G = E[g gᵀ]. The expectation of A is over all rows, that of G over the samples, of which the loss is the
mean: with N samples in a batch autograd gives g / N, so G = N Σ (g/N) (g/N)ᵀ over all rows. A convolution's positions
are summed up in G (Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", 2016).
Batches that are accumulated before a step count as the one batch that they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dear import _C
from precondition._layers import Layer


def factor_dtype(layer: Layer) -> torch.dtype:
    """Factors are never held in 16 bits."""
    return torch.float64 if layer.weight.dtype == torch.float64 else torch.float32


@dataclass
class Sums:
    """Of one layer, over the rows of all passes since the last step."""

    inputs: Tensor  # [blocks, in, in]
    outputs: Tensor  # [blocks, out, out]
    rows: int = 0
    samples: int = 0

    def factors(self, grad_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """A and G. ``grad_scale``: what the loss was multiplied by."""
        outputs = self.outputs * self.samples
        return self.inputs / max(self.rows, 1), outputs if grad_scale is None else outputs / grad_scale.square()


class Statistics:
    """The sums of the layers that this rank captures."""

    def __init__(self) -> None:
        self._sums: dict[Layer, Sums] = {}
        self.dropped: Tensor | None = None  # how many factors were not finite
        self._tasks: dict[Layer, int] = {}  # the backward pass that each layer's last rows are of

    def add(self, layer: Layer, x: Tensor, grad: Tensor) -> None:
        """Takes in one pass of a layer: a sink of :class:`precondition._capture.Capture`."""
        task = torch._C._current_graph_task_id()
        if layer.weight.grad is None and self._tasks.get(layer) != task:  # zero_grad() without a step
            self._sums.pop(layer, None)
        self._tasks[layer] = task
        dtype = factor_dtype(layer)
        if layer not in self._sums:
            a, g = (torch.zeros(layer.blocks, n, n, dtype=dtype, device=grad.device) for n in layer.sizes)
            self._sums[layer] = Sums(a, g)
        sums = self._sums[layer]
        with torch.autocast(grad.device.type, enabled=False):
            for part in layer.input_rows(x):
                rows = part.to(dtype)
                if layer.bias is not None:
                    rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
                sums.inputs.baddbmm_(rows.mT, rows)
                sums.rows += rows.shape[1]
            columns = layer.output_rows(grad).to(dtype)
            sums.outputs.baddbmm_(columns.mT, columns)
        sums.samples += layer.samples(x)

    def keep(self, layers: Iterable[Layer]) -> None:
        """Forgets all others."""
        kept = set(layers)
        self._sums = {layer: sums for layer, sums in self._sums.items() if layer in kept}

    def take(self, layers: Iterable[Layer], grad_scale: Tensor | None) -> dict[Layer, tuple[Tensor, Tensor, Tensor]]:
        """Of the layers that ran, A, G and a number: 1 where both are finite, and of some samples; else 0, and both are
        zeros. Sums start anew."""
        taken = {}
        for layer in layers:
            if layer in self._sums:
                some = self._sums[layer].samples > 0
                inputs, outputs = self._sums[layer].factors(grad_scale)
                finite = inputs.sum().isfinite() & outputs.sum().isfinite()
                missed = (~finite).int()
                self.dropped = missed if self.dropped is None else self.dropped + missed
                taken[layer] = (
                    torch.where(finite, inputs, 0.0), torch.where(finite, outputs, 0.0),
                    finite.to(inputs.dtype) * some,
                )  # fmt: skip
        self._sums.clear()
        return taken


class Running:
    """The running averages of a layer, on its owner."""

    _NAMES = ("inputs", "outputs", "seen", "ready")

    def __init__(self, layer: Layer) -> None:
        like = layer.weight.new_empty((), dtype=factor_dtype(layer))
        self.inputs, self.outputs = (like.new_zeros(layer.blocks, n, n) for n in layer.sizes)
        self.seen = like.new_zeros(())  # 1 once there was something to average, else 0
        self.ready = like.new_zeros(())  # 1 where the solution is of factors that were seen
        self.solution: tuple[Tensor, ...] = ()

    def update(self, inputs: Tensor, outputs: Tensor, counts: Tensor, decay: float) -> None:
        """F ← decay F + (1 - decay) new; the first one counts whole. Nothing where ``counts`` is 0."""
        weight = (1 - decay * self.seen) * (counts > 0)
        self.inputs.lerp_(inputs, weight)
        self.outputs.lerp_(outputs, weight)
        self.seen.copy_(self.seen.maximum(counts > 0))

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        solution = {f"solution{index}": each for index, each in enumerate(self.solution)}
        return {name: getattr(self, name) for name in self._NAMES} | solution

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes what :meth:`tensors` gave."""
        for name in self._NAMES:
            getattr(self, name).copy_(tensors[name])
        found = [tensors[f"solution{index}"] for index in range(len(tensors)) if f"solution{index}" in tensors]
        self.solution = tuple(each.to(self.inputs.device, copy=True) for each in found)


# --- Factors in a message: upper triangles, and a count -------------------------------------------------------------


def widest(layers: Iterable[Layer]) -> torch.dtype:
    """The type of a message about these layers."""
    return max(map(factor_dtype, layers), key=lambda dtype: dtype.itemsize)


def message_size(layer: Layer) -> int:
    """Elements of a layer's factors in a message."""
    return sum(_sizes(layer.blocks, layer.sizes)) + 1


def _sizes(blocks: int, sides: Iterable[int]) -> list[int]:
    """Elements of the upper triangles of factors with these sides."""
    return [blocks * n * (n + 1) // 2 for n in sides]


def pack(inputs: Tensor, outputs: Tensor, counts: Tensor, message: Tensor) -> None:
    """Writes symmetric factors to a message."""
    pair = inputs, outputs
    uppers = message[:-1].split(_sizes(len(inputs), [factor.shape[1] for factor in pair]))
    for factor, upper in zip(pair, uppers, strict=True):
        if message.is_cpu:
            _C.write_triangles(factor.to(message.dtype), upper)
        else:
            rows, columns = torch.triu_indices(*factor.shape[1:], device=factor.device)
            upper.copy_(factor[:, rows, columns].reshape(-1))
    message[-1:].copy_(counts)


def unpack(layer: Layer, message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean factors of those ranks that count, from the mean of all ranks' messages, and the mean count."""
    message = message.to(factor_dtype(layer))
    counts = message[-1]
    means = torch.where(counts > 0, message[:-1] / counts, 0.0)
    uppers = means.split(_sizes(layer.blocks, layer.sizes))
    inputs, outputs = (_symmetric(upper, layer.blocks, n) for upper, n in zip(uppers, layer.sizes, strict=True))
    return inputs, outputs, counts


def _symmetric(upper: Tensor, blocks: int, n: int) -> Tensor:
    if upper.is_cpu:
        return _C.from_triangles(upper, blocks, n)
    rows, columns = torch.triu_indices(n, n, device=upper.device)
    factor = upper.new_empty(blocks, n, n)
    factor[:, rows, columns] = factor[:, columns, rows] = upper.view(blocks, -1)
    return factor
