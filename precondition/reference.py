"""Golden models of K-FAC and DP-KFAC: a step of one layer in plain torch, written from the papers' equations.

To be read beside the papers and compared with, not to be fast: dense matrices, whole Kronecker products where a paper
writes them, ``unfold`` for patches. Shapes: ``x`` is a layer's input and ``g`` the gradient of its output, with samples
first; a row is what one sample gives at one position, and a layer's gradient is a matrix [out, in + 1]. Grouped
convolutions are taken apart by the caller.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Rows a of the input, a 1 appended for the bias: [rows, in + 1]."""
    if isinstance(module, nn.Embedding):  # rows that are 1 at one place
        rows = torch.zeros(x.numel(), module.num_embeddings, dtype=module.weight.dtype)
        rows[torch.arange(x.numel()), x.flatten()] = 1
        if module.padding_idx is not None:
            rows[:, module.padding_idx] = 0
        return rows
    if isinstance(module, nn.Conv1d):  # a picture of one line
        (size,), (stride,), (dilation,) = module.kernel_size, module.stride, module.dilation
        padding = (0, int(module.padding[0]))
        plane = nn.Conv2d(1, 1, (1, size), (1, stride), padding, (1, dilation), bias=module.bias is not None)
        return input_rows(plane, x[:, :, None])
    if isinstance(module, nn.Conv2d):
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
        rows = patches.mT.reshape(-1, patches.shape[1])
    else:
        rows = x.reshape(-1, x.shape[-1])
    if module.bias is None:
        return rows
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=x.dtype)], 1)


def output_rows(module: nn.Module, g: Tensor) -> Tensor:
    """Rows of the gradient of the output: [rows, out]."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return g.flatten(2).mT.reshape(-1, g.shape[1])
    return g.reshape(-1, g.shape[-1])


def factors(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A = E[a aᵀ] over rows; G = E[Σ g gᵀ] over samples, the sum over positions, g being the gradient of a sample's own
    loss: ``len(x)`` times what autograd gives of their mean."""
    a, rows = input_rows(module, x), output_rows(module, g) * len(x)
    return a.T @ a / len(a), rows.T @ rows / len(x)


def running(old: Tensor | None, new: Tensor, decay: float) -> Tensor:
    """The running average of a factor; damping never enters it."""
    return new if old is None else decay * old + (1 - decay) * new


def precondition_cholesky(grad: Tensor, a: Tensor, g: Tensor, damping: float) -> Tensor:
    """(G + √γ/π I)⁻¹ ∇ (A + π√γ I)⁻¹, π² = (tr A / dim A) / (tr G / dim G)."""
    pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
    left = torch.linalg.inv(g + damping**0.5 / pi * torch.eye(len(g), dtype=g.dtype))
    right = torch.linalg.inv(a + damping**0.5 * pi * torch.eye(len(a), dtype=a.dtype))
    return left @ grad @ right


def precondition_eigen(grad: Tensor, a: Tensor, g: Tensor, damping: float) -> Tensor:
    """(G ⊗ A + γ I)⁻¹ vec(∇), as one system of equations."""
    curvature = torch.kron(g, a)
    return torch.linalg.solve(curvature + damping * torch.eye(len(curvature), dtype=a.dtype), grad.reshape(-1)).view_as(
        grad
    )


def kl_scale(pairs: list[tuple[Tensor, Tensor, float]], kl_clip: float) -> Tensor:
    """min(1, √(κ / Σ lr² ⟨P, ∇⟩)) over layers' (P, ∇, lr)."""
    total = torch.stack([lr**2 * (p * grad).sum() for p, grad, lr in pairs]).sum()
    return torch.clamp((kl_clip / total).sqrt(), max=1.0)
