"""Power-SGD: both low-rank factors each step, one after the other."""

from __future__ import annotations

from typing import Any, ClassVar

from compress.low_rank import LowRank
from dear import _C


class PowerSGD(LowRank):
    """One subspace iteration a step. For the gradient M [n, m] of each rank, with error E:

    1. P <- mean over the ranks of (M + E) Q
    2. P <- orthogonalise(P)
    3. Q <- (M + E)ᵀ P;  E <- (M + E) - P Qᵀ;  Q <- mean of Q over the ranks
    4. M <- P Qᵀ

    Q starts from a normal distribution; later steps start from the last Q. Two messages a step that depend on each
    other, (n + m) r elements for a matrix; dense members travel in the first.

    Args:
        rank: ``"auto"`` is an eighth of the smaller side; :class:`compress.low_rank.LowRank` has the rest, ``rank_of``
            and ``exempt``.
        min_compression_ratio: of n m to (n + m) r.
        Others: see :class:`compress.Compressor`.

    Source: Vogels, Karimireddy, Jaggi: "PowerSGD", NeurIPS 2019, Algorithms 1 and 2. There E is what all ranks' mean
    missed; here each rank keeps what its own share missed, which sums to the same.
    """

    auto: ClassVar[float] = 1 / 8

    @property
    def exchanges(self) -> int:
        return 4

    def cost(self, rows: int, columns: int, rank: int) -> float:
        return (rows + columns) * rank

    def codec(self, arguments: dict[str, Any]) -> _C.Codec:
        return _C.PowerCodec(**arguments)
