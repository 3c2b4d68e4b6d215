"""Dense: every element, in 16 bits on the wire."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from compress.compressor import Compressor
from compress.group import Group
from dear import _C


class Dense(Compressor):
    """The mean gradient with a 16-bit wire format: rounded once by each rank, summed in float32 by the shard's owner,
    and rounded once more. A 16-bit all-reduce sends the same bytes and rounds at every hop.

    Without error feedback, values beyond float16's range (65504) count as not finite; with it, they are sent in parts.

    Args:
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        error_feedback: keeps what rounding lost, at both roundings; off by default, as for any 16-bit all-reduce.
        Others: see :class:`compress.Compressor`.
    """

    exchange: ClassVar[Literal["sum", "owners", "gather"]] = "owners"
    usual_ratio: ClassVar[float] = 2.0
    part_numel: ClassVar[int | None] = 1 << 20

    def __init__(self, dtype: torch.dtype = torch.bfloat16, *, error_feedback: bool = False, **options: Any) -> None:
        super().__init__(error_feedback=error_feedback, **options)
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, not {dtype!r}.")
        self.dtype = dtype

    def options(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype)}

    def ratio(self, group: Group) -> float:
        return self.usual_ratio

    def shard_numel(self, group: Group) -> int:
        return -(-group.numel // (2 * group.world)) * 2  # whole 32-bit words

    def native(self, group: Group) -> _C.Codec:
        return _C.HalfCodec(shard=self.shard_numel(group), dtype=self.dtype, **self.codec_arguments(group))
