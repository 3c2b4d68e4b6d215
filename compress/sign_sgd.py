"""Sign-SGD: one bit per element, both ways."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from compress.compressor import Compressor
from compress.group import Group
from compress.reference import BLOCK, RECORD
from dear import _C


class SignSGD(Compressor):
    """Each rank sends the signs of its gradient, packed; each shard's owner sends signs back.

    ``vote="mean"`` (EF-SignSGD): per block of 4096 elements a scale, ``C(c) = mean |c| * sign(c)``. With g the rank's
    gradient and e its error, ê the owner's error, P ranks:

        rank:   c = g + e;  send C(c);  e <- c - C(c)
        owner:  s = (sum of the ranks' C(c)) / P + ê;  send C(s);  ê <- s - C(s)

    ``vote="majority"``: signs alone; the owner counts votes on packed words, and every element of the result is +1
    or -1, so the learning rate sets the size of a step. Ties go to a rank that changes every step. Error feedback has
    no meaning there and is off.

    Args:
        vote: ``"mean"`` or ``"majority"``.
        Others: see :class:`compress.Compressor`. Groups too small to fill their blocks stay dense.

    Source: Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019; blockwise and two-way: Zheng et al.,
    NeurIPS 2019, Algorithm 2; majority vote: Bernstein et al., ICLR 2019.
    """

    exchange: ClassVar[Literal["sum", "owners", "gather"]] = "owners"

    def __init__(
        self, *, vote: Literal["mean", "majority"] = "mean", error_feedback: bool | None = None, **options: Any
    ) -> None:
        if vote not in ("mean", "majority"):
            raise ValueError(f'vote must be "mean" or "majority", not {vote!r}.')
        if vote == "majority" and error_feedback is True:
            raise ValueError('A majority vote has no size, so it takes no error feedback: use vote="mean" for that.')
        super().__init__(error_feedback=vote == "mean" if error_feedback is None else error_feedback, **options)
        self.vote = vote

    def options(self) -> dict[str, Any]:
        return {"vote": self.vote}

    def ratio(self, group: Group) -> float:
        return group.numel / (group.world * self._words(group))

    def natives(self, group: Group) -> list[tuple[int, _C.Codec]]:
        arguments = self.codec_arguments(group)
        return [(0, _C.SignCodec(words=self._words(group), scaled=self.vote == "mean", **arguments))]

    def _words(self, group: Group) -> int:
        """int32 words that say one owner's shard."""
        return self.shard_numel(group) // BLOCK * RECORD
