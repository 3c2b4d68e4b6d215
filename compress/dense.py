"""Dense: every element, in 16 bits on the wire."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compress.compressor import Compressor
from compress.group import Group


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

    def __init__(self, dtype: torch.dtype = torch.bfloat16, *, error_feedback: bool = False, **options: Any) -> None:
        super().__init__(error_feedback=error_feedback, **options)
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, not {dtype!r}.")
        self.dtype = dtype

    def options(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype)}

    def ratio(self, group: Group) -> float:
        return 2.0

    def shard_numel(self, group: Group) -> int:
        return -(-group.numel // (2 * group.world)) * 2  # whole 32-bit words

    def encode(self, group: Group) -> Tensor:
        payload = group.buffer("payload", (group.world, self.shard_numel(group)), self.dtype)
        self._round(self.corrected(group) if group.error is not None else group.gradient, group.error,
                    payload.view(-1)[: group.numel])  # fmt: skip
        return payload

    def merge(self, group: Group, received: Tensor) -> Tensor:
        begin, end = self.owned_range(group)
        total = received[:, : end - begin].sum(0, dtype=torch.float32).div_(group.world)
        if group.owner_error is not None:
            total = group.owner_error.add_(total)
        merged = group.buffer("merged", (self.shard_numel(group),), self.dtype)
        self._round(total, group.owner_error, merged[: end - begin])
        group.dropped.add_((~merged.isfinite()).sum())
        return merged

    def decode(self, group: Group, payload: Tensor) -> None:
        shard = self.shard_numel(group)
        for owner in range(group.world):
            part = group.gradient[owner * shard : (owner + 1) * shard]
            part.copy_(payload[owner, : part.numel()])

    def _round(self, values: Tensor, error: Tensor | None, out: Tensor) -> None:
        """``out`` <- the values in 16 bits; ``error``, which holds the values, keeps the difference."""
        if error is None:
            out.copy_(values)
            return
        largest = torch.finfo(self.dtype).max
        out.copy_(values.clamp(-largest, largest))
        error.sub_(out)
