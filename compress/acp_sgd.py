"""ACP-SGD: one low-rank factor each step, the other one the next."""

from __future__ import annotations

from typing import Any, ClassVar

from compress.low_rank import LowRank
from dear import _C


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
        rank: ``"auto"`` is a quarter of the smaller side; :class:`compress.low_rank.LowRank` has the rest, ``rank_of``
            and ``exempt``.
        min_compression_ratio: of n m to (n + m) r / 2.
        Others: see :class:`compress.Compressor`.

    Source: Zhang, Zhao, Shi, Chu, Li: "Evaluation and Optimization of Gradient Compression for Distributed Deep
    Learning", ICDCS 2023, Algorithm 1.
    """

    auto: ClassVar[float] = 1 / 4

    def cost(self, rows: int, columns: int, rank: int) -> float:
        return (rows + columns) * rank / 2

    def codec(self, arguments: dict[str, Any]) -> _C.Codec:
        return _C.AcpCodec(start=self.start.native, **arguments)
