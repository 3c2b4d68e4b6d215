"""Power-SGD: both low-rank factors each step, one after the other."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from compress.group import Group
from compress.low_rank import LowRank
from compress.pipeline import Exchange, Steps


class PowerSGD(LowRank):
    """One subspace iteration a step. For the gradient M [n, m] of each rank, with error E:

    1. P <- mean over the ranks of (M + E) Q
    2. P <- orthogonalise(P)
    3. Q <- (M + E)ᵀ P;  E <- (M + E) - P Qᵀ;  Q <- mean of Q over the ranks
    4. M <- P Qᵀ

    Q starts from a normal distribution; later steps start from the last Q. Two messages a step that depend on each
    other, (n + m) r elements for a matrix; dense members travel in the first.

    Args:
        rank: r, at most 256 and at most the smaller side; smaller compresses more.
        min_compression_ratio: of n m to (n + m) r.
        Others: see :class:`compress.Compressor`.

    Source: Vogels, Karimireddy, Jaggi: "PowerSGD", NeurIPS 2019, Algorithms 1 and 2. There E is what all ranks' mean
    missed; here each rank keeps what its own share missed, which sums to the same.
    """

    stages: ClassVar[int] = 4

    def cost(self, rows: int, columns: int, rank: int) -> float:
        return (rows + columns) * rank

    def ratio(self, group: Group) -> float:
        batches = group.plan.batches
        return group.numel / (sum(b.p.numel() + b.q.numel() for b in batches) + group.plan.dense_numel)

    def compressed_steps(self, group: Group) -> Steps:
        batches, dense = group.plan.batches, group.plan.dense_numel
        numel = sum(batch.p.numel() for batch in batches)
        message = group.buffer("message of P", (numel + dense + 1,))
        ps = _views(message, [batch.p for batch in batches])
        corrected = [self._start(group, index) for index in range(len(batches))]
        for batch, matrix, p in zip(batches, corrected, ps, strict=True):
            torch.bmm(matrix, batch.q, out=p)
        self.encode_dense(group, message[numel : numel + dense])
        message[-1:].copy_(group.dropped)
        yield Exchange("reduce_scatter", message)
        yield Exchange("all_gather", message)

        group.bad = message[-1:]
        self.decode_dense(group, message[numel : numel + dense])
        second = group.buffer("message of Q", (sum(batch.q.numel() for batch in batches),))
        qs = _views(second, [batch.q for batch in batches])
        for batch, matrix, p, q in zip(batches, corrected, ps, qs, strict=True):
            batch.p.copy_(p)
            self.orthogonalize(group, batch.p)
            torch.bmm(matrix.mT, batch.p, out=q)
            self.keep_residual(batch, batch.p, q)
        yield Exchange("reduce_scatter", second)
        yield Exchange("all_gather", second)

        for batch, q in zip(batches, qs, strict=True):
            batch.q.copy_(q)
            self.decode_batch(group, batch)

    def _start(self, group: Group, index: int) -> Tensor:
        return self.corrected_batch(group, group.plan.batches[index])


def _views(flat: Tensor, likes: list[Tensor]) -> list[Tensor]:
    """Views of ``flat`` shaped as these, one behind the other."""
    views, start = [], 0
    for like in likes:
        views.append(flat[start : start + like.numel()].view(like.shape))
        start += like.numel()
    return views
