"""Plain-torch golden models of Eva, and of the vectorised FOOF and Shampoo of the same paper.

Written to be read beside the paper and to be compared with, not to be fast: patches are unfolded, and curvature
matrices are built and solved with. Source: Zhang et al., "Eva: Practical Second-order Optimization with
Kronecker-vectorized Approximation", 2023.

Shapes: of a layer's gradient ``G`` [rows, columns] a row is an output, and a column an input, the last one the bias
where there is one. ``a`` [columns] is the mean input, ``b`` [rows] the mean gradient of the outputs, ``damping`` is the
paper's γ. A grouped convolution is as many layers as it has groups.

Note [The mean gradient of the outputs]
``b`` is the mean over samples of the gradient of each sample's own loss, which is the *sum* over the batch of what
autograd gives for the outputs when the loss is a mean. So it depends neither on the size of the batch nor on how the
batch is cut into micro-batches (with the loss divided by their number), and it has the scale of the gradient itself:
of a layer with a bias, it is the gradient of the bias. Positions (of a sequence or an image) are summed alike. The
authors' code takes the mean of what autograd gives, which is smaller by the size of the batch times the number of
positions, so that nearly all that is left of the curvature is the damping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- What a layer has seen --------------------------------------------------------------------------------------------


def patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The inputs of each group [groups, batch × positions, columns]; with a bias, the last column is 1."""
    if isinstance(layer, nn.Linear):
        found = inputs.reshape(1, -1, layer.in_features)
    else:
        assert isinstance(layer, nn.Conv1d | nn.Conv2d)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        lift = (1,) if isinstance(layer, nn.Conv1d) else ()  # unfold knows images only
        padded = padded.unsqueeze(2) if lift else padded
        unfolded = F.unfold(
            padded, lift + layer.kernel_size, dilation=lift + layer.dilation, stride=lift + layer.stride
        )
        grouped = unfolded.unflatten(1, (layer.groups, -1))  # [batch, groups, columns, positions]
        found = grouped.permute(1, 0, 3, 2).flatten(1, 2)
    ones = found.new_ones((*found.shape[:-1], 1 if layer.bias is not None else 0))
    return torch.cat([found, ones], dim=-1)


def mean_input(layer: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """``a`` of each group [groups, columns]: the mean over the passes of a step, as their losses count alike."""
    return torch.stack([patches(layer, each).mean(1) for each in inputs]).mean(0)


def mean_output_gradient(layer: nn.Module, gradients: Sequence[Tensor]) -> Tensor:
    """``b`` of each group [groups, rows], of the outputs' gradients of a step; see the note."""
    if isinstance(layer, nn.Linear):
        return torch.stack([each.reshape(-1, layer.out_features).sum(0) for each in gradients]).sum(0).view(1, -1)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    return torch.stack([each.transpose(0, 1).flatten(1).sum(1) for each in gradients]).sum(0).view(layer.groups, -1)


def gradient(layer: nn.Module, bias: bool = True) -> Tensor:
    """``G`` of each group [groups, rows, columns]."""
    weight: Any = layer.weight
    groups = getattr(layer, "groups", 1)
    found = weight.grad.reshape(groups, weight.shape[0] // groups, -1)
    if bias and layer.bias is not None:
        found = torch.cat([found, layer.bias.grad.view(groups, -1, 1)], dim=2)  # type: ignore[union-attr, operator]
    return found


# --- Preconditioning --------------------------------------------------------------------------------------------------


def _solve(left: Tensor, right: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """(left ⊗ right + γ I)⁻¹ applied to the gradient."""
    curvature = torch.kron(left, right)
    damped = curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)
    return torch.linalg.solve(damped, gradient.flatten()).view_as(gradient)


def eva(gradient: Tensor, a: Tensor, b: Tensor, damping: float) -> Tensor:
    """(b bᵀ ⊗ a aᵀ + γ I)⁻¹ G."""
    return _solve(torch.outer(b, b), torch.outer(a, a), gradient, damping)


def foof(gradient: Tensor, a: Tensor, damping: float) -> Tensor:
    """(I ⊗ a aᵀ + γ I)⁻¹ G: the inputs alone."""
    return _solve(torch.eye(len(gradient), dtype=gradient.dtype), torch.outer(a, a), gradient, damping)


def eva_closed(gradient: Tensor, a: Tensor, b: Tensor, damping: float) -> Tensor:
    """:func:`eva` by Sherman and Morrison: (G - b aᵀ · (bᵀ G a) / (‖a‖² ‖b‖² + γ)) / γ."""
    scale = (b @ gradient @ a) / (a.dot(a) * b.dot(b) + damping)
    return (gradient - scale * torch.outer(b, a)) / damping


def foof_closed(gradient: Tensor, a: Tensor, damping: float) -> Tensor:
    """:func:`foof` by Sherman and Morrison: (G - G a aᵀ / (‖a‖² + γ)) / γ."""
    return (gradient - torch.outer(gradient @ a, a) / (a.dot(a) + damping)) / damping


def kl_factor(pairs: Sequence[tuple[Tensor, Tensor, float]], kl_clip: float | None) -> Tensor:
    """By what all preconditioned gradients are multiplied: of (preconditioned, gradient, learning rate) of every layer.

    min(1, √(κ / Σ lr² ⟨preconditioned, gradient⟩)); without κ √(Σ ‖gradient‖² / Σ ‖preconditioned‖²).
    """
    if kl_clip is None:
        before = torch.stack([gradient.square().sum() for _, gradient, _ in pairs]).sum()
        after = torch.stack([preconditioned.square().sum() for preconditioned, _, _ in pairs]).sum()
        return (before / after).sqrt()
    change = torch.stack([lr**2 * (preconditioned * gradient).sum() for preconditioned, gradient, lr in pairs]).sum()
    return (kl_clip / change).sqrt().clamp(max=1.0)


# --- A step -----------------------------------------------------------------------------------------------------------


class Reference:
    """Preconditions the gradients of a model that one process trains on all ranks' batches.

    kind: ``"eva"``, ``"foof"`` or ``"shampoo"``.
    """

    def __init__(
        self, kind: str, layers: Sequence[nn.Module], *, damping: float, factor_decay: float, kl_clip: float | None
    ) -> None:
        self.kind, self.layers = kind, list(layers)
        self.damping, self.factor_decay, self.kl_clip = damping, factor_decay, kl_clip
        self._seen: dict[nn.Module, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in layers}
        self._means: list[dict[nn.Module, tuple[Tensor, Tensor]]] = []  # of each rank, in this step
        self._running: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for layer in self.layers:
            layer.register_forward_hook(self._watch)

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            self._seen[layer][0].append(inputs[0].detach())
            output.register_hook(self._seen[layer][1].append)

    def next_rank(self) -> None:
        """What was seen since the last call was one rank's."""
        self._means.append(
            {
                layer: (mean_input(layer, inputs), mean_output_gradient(layer, gradients))
                for layer, (inputs, gradients) in self._seen.items()
            }
        )
        for seen in self._seen.values():
            seen[0].clear()
            seen[1].clear()

    def step(self, lr: float | Callable[[nn.Module], float]) -> None:
        """Preconditions ``.grad``, which is the mean of all ranks' gradients."""
        results, pairs = [], []
        for layer in self.layers:
            whole = gradient(layer, bias=self.kind != "shampoo")
            if self.kind == "shampoo":
                whole = whole.flatten(0, 1).unsqueeze(0)
                new = whole.mean(1), whole.mean(2)
            else:
                each = [means[layer] for means in self._means]
                new = torch.stack([a for a, _ in each]).mean(0), torch.stack([b for _, b in each]).mean(0)
            old = self._running.get(layer, new)
            decay = self.factor_decay
            a, b = self._running[layer] = tuple(
                decay * before + (1 - decay) * now for before, now in zip(old, new, strict=True)
            )  # type: ignore[assignment]
            for index in range(len(whole)):
                if self.kind == "foof":
                    found = foof(whole[index], a[index], self.damping)
                else:
                    found = eva(whole[index], a[index], b[index], self.damping)
                results.append((layer, index, found))
                pairs.append((found, whole[index], lr(layer) if callable(lr) else lr))
        factor = kl_factor(pairs, self.kl_clip)
        for layer, index, found in results:
            self._write(layer, index, factor * found)
        self._means.clear()

    def _write(self, layer: nn.Module, index: int, found: Tensor) -> None:
        weight: Any = layer.weight
        bias: Any = layer.bias if self.kind != "shampoo" else None
        groups = 1 if self.kind == "shampoo" else getattr(layer, "groups", 1)
        rows = slice(index * weight.shape[0] // groups, (index + 1) * weight.shape[0] // groups)
        weight.grad[rows] = found[:, : found.shape[1] - (bias is not None)].reshape(weight.grad[rows].shape)
        if bias is not None:
            bias.grad[rows] = found[:, -1]
