"""ACP-SGD: one low-rank factor each step, the other one the next."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.group import Group
from compress.low_rank import Batch, LowRank


class ACPSGD(LowRank):
    """Alternate compressed Power-SGD. For the gradient M [n, m] of each rank, with error E:

    odd steps                        even steps
    -------------------------------  -------------------------------
    Q <- orthogonalise(Q)            P <- orthogonalise(P)
    P <- (M + E) Q                   Q <- (M + E)ᵀ P
    E <- (M + E) - P Qᵀ              E <- (M + E) - P Qᵀ
    P <- mean of P over the ranks    Q <- mean of Q over the ranks
    M <- P Qᵀ                        M <- P Qᵀ

    Q starts from a normal distribution; later steps start from the last factors. One message a step, n r or m r
    elements for a matrix, is half of Power-SGD's, and its mean is a sum like any gradient's. The error is exact:
    the other factor is the same on all ranks.

    Args:
        rank: r, at most 256 and at most the smaller side; smaller compresses more.
        min_compression_ratio: of n m to (n + m) r / 2.
        Others: see :class:`compress.Compressor`.

    Source: Zhang, Zhao, Shi, Chu, Li: "Evaluation and Optimization of Gradient Compression for Distributed Deep
    Learning", ICDCS 2023, Algorithm 1.
    """

    def cost(self, rows: int, columns: int, rank: int) -> float:
        return (rows + columns) * rank / 2

    def ratio(self, group: Group) -> float:
        return group.numel / (self._payload_numel(group, True) / 2 + self._payload_numel(group, False) / 2)

    def encode(self, group: Group) -> Tensor:
        odd = self._sends_p(group)
        payload = self.payload(group, self._payload_numel(group, odd))
        for batch, factor in self._factors_in(group, payload, odd):
            fixed = batch.q if odd else batch.p
            corrected = self.corrected_batch(group, batch)
            self.orthogonalize(group, fixed)
            torch.bmm(corrected if odd else corrected.mT, fixed, out=factor)
            self.keep_residual(batch, *((factor, fixed) if odd else (fixed, factor)))
        self.encode_dense(group, payload[payload.numel() - group.plan.dense_numel :])
        return payload

    def decode(self, group: Group, payload: Tensor) -> None:
        odd = self._sends_p(group)
        for batch, factor in self._factors_in(group, payload, odd):
            (batch.p if odd else batch.q).copy_(factor)
            self.decode_batch(group, batch)
        self.decode_dense(group, payload[payload.numel() - group.plan.dense_numel :])

    def _sends_p(self, group: Group) -> bool:
        return (group.step - self.start_step) % 2 == 0  # the paper counts from 1

    @staticmethod
    def _payload_numel(group: Group, odd: bool) -> int:
        return sum((b.p if odd else b.q).numel() for b in group.plan.batches) + group.plan.dense_numel

    @staticmethod
    def _factors_in(group: Group, payload: Tensor, odd: bool) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with its place in the payload."""
        start = 0
        for batch in group.plan.batches:
            like = batch.p if odd else batch.q
            yield batch, payload[start : start + like.numel()].view(like.shape)
            start += like.numel()
