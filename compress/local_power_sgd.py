"""Local Power-SGD: every rank's own matrix in low rank, in one message that all ranks gather."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from compress.group import Group, Member
from compress.low_rank import Batch, LowRank, checked_factors, make_factors
from dear import _C


class LocalPowerSGD(LowRank):
    """One subspace iteration a step, by each rank alone. For the gradient M [n, m] of each of P ranks, with error E:

    1. L <- orthogonalise((M + E) R)
    2. R <- (M + E)ᵀ L;  E <- (M + E) - L Rᵀ
    3. all ranks gather L and R
    4. M <- mean over the ranks of L Rᵀ

    R starts from a normal distribution; later steps start from the rank's own last R. Both factors fit what this very
    step's examples bring, as Power-SGD's do and ACP-SGD's do not, and they go out in one message, where Power-SGD
    needs two that depend on each other. In return the result has up to P r columns, and bytes grow with P: a rank
    sends (P - 1) r (n + m) elements for a matrix, what Power-SGD sends of rank P r / 2. So it is for few ranks: two
    workers send as much as with Power-SGD of that rank; with ``hierarchy="node"`` it is nodes that count. Dense members
    travel in the same message, (P - 1) times.

    Factors are each rank's own. A saved state goes on bit for bit on as many ranks; on another number error feedback
    goes on, and factors start anew.

    Args:
        rank: of what each rank sends. ``"auto"`` is an eighth of the smaller side, and ``"4x"`` the largest that sends
            at least 4 times fewer elements than an all-reduce of the matrix, which depends on P;
            :class:`compress.low_rank.LowRank` has the rest, ``rank_of`` and ``exempt``.
        factor_dtype: as there. Each factor is rounded once, by the rank whose it is.
        min_compression_ratio: of n m to (n + m) r, which is what counts within a message. A bucket of which P ranks
            would send more than an all-reduce does (or by that option, if it is less than 1) stays dense as a whole.
        Others: see :class:`compress.Compressor`.

    Raises:
        ValueError: an option is not one of these.

    This is our own. It builds on Power-SGD (Vogels, Karimireddy, Jaggi, NeurIPS 2019), whose iteration with error
    feedback it takes to each rank's own matrix. Gathering every rank's factors is as in Spectral-ATOMO: Wang et al.,
    "ATOMO: Communication-efficient Learning via Atomic Sparsification", NeurIPS 2018.
    """

    exchange: ClassVar[Literal["sum", "owners", "gather"]] = "gather"
    auto: ClassVar[float] = 1 / 8

    def cost(self, rows: int, columns: int, rank: int) -> float:
        return (rows + columns) * rank * self._world / 2  # an all-reduce sends each element 2 (P - 1) / P times

    @property
    def _world(self) -> int:
        """How many gather."""
        return self.ranks().size() if self.levels is None else len(self.levels.nodes.ranks)

    def _sent(self, member: Member, rank: int) -> float:
        return super()._sent(member, rank) / self.cost(1, 0, 1)  # dense members are gathered just the same

    def ratio(self, group: Group) -> float:
        rows, columns, dense = self._elements(group)
        return group.numel / ((self._words(rows, 1) + self._words(columns, 1) + dense) * group.world / 2)

    def compresses(self, group: Group) -> bool:
        begun = not self.feedback.begun.isdisjoint(group.names)
        return super().compresses(group) and (begun or self.ratio(group) >= min(1.0, self.min_compression_ratio))

    def prepare_reader(self, group: Group) -> None:
        group.private = self._lay_out(group, _without_feedback)
        if self.error_feedback:
            self.feedback.begun.update(member.name for batch in group.private.batches for member in batch.members)

    def codec(self, arguments: dict[str, Any]) -> _C.Codec:
        return _C.LocalCodec(**arguments)

    # --- state: the factors are this rank's own ---

    def named_state(self) -> dict[str, Any]:
        return {}

    def load_named_state(self, state: dict[str, Any]) -> None:
        pass

    def own_state(self) -> dict[str, Any]:
        return {"factors": super().named_state()}

    def load_own_state(self, state: Any) -> None:
        factors = state.get("factors") if isinstance(state, dict) else None
        if not isinstance(factors, dict):
            raise ValueError(
                'The compressor\'s state is damaged: "own" must have factors by name; load what state_dict() returned.'
            )
        self._factors = checked_factors(factors)

    def forget_own_state(self) -> None:
        self._factors.clear()


def _without_feedback(group: Group, members: list[Member], ranks: tuple[int, ...]) -> Batch:
    return Batch(members, None, make_factors(group, members, ranks))
