"""From damped factors to preconditioned gradients: by Cholesky's inverses, or in the factors' eigenvectors.

Everything is batched: a batch holds the blocks of all layers of one shape, gradients as [blocks, out, in].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

ATTEMPTS = 9  # of an inversion: each adds ten times the damping of the one before

Solution = tuple[Tensor, ...]  # of a batch, blocks first


def by_size(matrices: Sequence[Tensor], work: Callable[[Tensor, list[int]], list[Tensor]]) -> list[list[Tensor]]:
    """Does ``work`` on matrices [blocks, n, n] joined to one batch for each n and type; returns its results for each of
    them. ``work`` also gets which of them are in the batch."""
    batches: dict[tuple[int, torch.dtype], list[int]] = {}
    for index, matrix in enumerate(matrices):
        batches.setdefault((matrix.shape[-1], matrix.dtype), []).append(index)
    results: list[list[Tensor]] = [[] for _ in matrices]
    for indices in batches.values():
        sizes = [len(matrices[index]) for index in indices]
        for result in work(torch.cat([matrices[index] for index in indices]), indices):
            for index, part in zip(indices, result.split(sizes), strict=True):
                results[index].append(part)
    return results


def mean_diagonal(matrices: Tensor) -> Tensor:
    """tr M / dim M of each: [blocks, 1, 1]."""
    return matrices.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]


class Solver(ABC):
    """What is done with factors A [blocks, in, in] and G [blocks, out, out]."""

    name: ClassVar[str]

    def __init__(self, damping: float) -> None:
        self.damping = damping
        self.damped_further: Tensor | None = None  # how many inversions needed more damping

    @abstractmethod
    def solve(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Solution]:
        """What :meth:`apply` needs, for each pair of factors. Never non-finite, if the factors are finite."""

    @abstractmethod
    def apply(self, solution: Solution, grads: Tensor) -> Tensor:
        """The preconditioned gradients."""


class Cholesky(Solver):
    """(G + √γ/π I)⁻¹ ∇ (A + π√γ I)⁻¹ with π² = (tr A / dim A) / (tr G / dim G), or 1 where a trace is zero (Martens
    and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015, section 6.3)."""

    name = "cholesky"

    def solve(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Solution]:
        factors, dampings = [], []
        for a, g in zip(inputs, outputs, strict=True):
            trace_a, trace_g = mean_diagonal(a), mean_diagonal(g)
            pi = torch.where((trace_a > 0) & (trace_g > 0), (trace_a / trace_g).sqrt(), 1.0)
            factors += [a, g]
            dampings += [pi * self.damping**0.5, self.damping**0.5 / pi]

        def invert(matrices: Tensor, indices: list[int]) -> list[Tensor]:
            return [self._inverse(matrices, torch.cat([dampings[index] for index in indices]))]

        inverses = [result[0] for result in by_size(factors, invert)]
        return list(zip(inverses[::2], inverses[1::2], strict=True))

    def _inverse(self, matrices: Tensor, damping: Tensor) -> Tensor:
        """(M + damping I)⁻¹. What cannot be inverted is damped further, in the last resort as a diagonal matrix."""
        size = matrices.shape[-1]
        step = torch.finfo(matrices.dtype).eps * (mean_diagonal(matrices) + damping)
        extra = torch.zeros_like(damping)
        eye = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
        for attempt in range(ATTEMPTS):
            factor, info = torch.linalg.cholesky_ex(matrices + (damping + extra) * eye)
            failed = (info != 0)[:, None, None]
            if attempt == 0:
                further = failed.sum()
                self.damped_further = further if self.damped_further is None else self.damped_further + further
            if not bool(failed.any()):  # the one question to the device, for all matrices of this size
                break
            extra = torch.where(failed, step * 10**attempt, extra)
        inverse = torch.cholesky_inverse(factor)
        sound = ~failed & inverse.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        return torch.where(sound, inverse, eye / (mean_diagonal(matrices) + damping))

    def apply(self, solution: Solution, grads: Tensor) -> Tensor:
        inputs, outputs = solution
        return outputs @ grads @ inputs


class Eigen(Solver):
    """V_G [(V_Gᵀ ∇ V_A) / (λ_G λ_Aᵀ + γ)] V_Aᵀ with the factors' eigenvectors and eigenvalues (George et al., 2018, and
    Pauloski et al., "Convolutional Neural Network Training with Distributed K-FAC", 2020)."""

    name = "eigen"

    def solve(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Solution]:
        factors = [factor for pair in zip(inputs, outputs, strict=True) for factor in pair]

        def decompose(matrices: Tensor, indices: list[int]) -> list[Tensor]:
            values, vectors = torch.linalg.eigh(matrices)
            return [vectors, values.clamp_(min=0)]

        found = by_size(factors, decompose)
        return [(*a, *g) for a, g in zip(found[::2], found[1::2], strict=True)]

    def apply(self, solution: Solution, grads: Tensor) -> Tensor:
        a, values_a, g, values_g = solution
        inner = (g.mT @ grads @ a) / (values_g[:, :, None] * values_a[:, None, :] + self.damping)
        return g @ inner @ a.mT


SOLVERS: dict[str, type[Solver]] = {kind.name: kind for kind in (Cholesky, Eigen)}
