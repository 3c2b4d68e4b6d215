"""Dense: every element, in 16 or in 8 bits on the wire."""

from __future__ import annotations

import zlib
from typing import Any, ClassVar, Literal

import torch

from compress import ops
from compress.compressor import Compressor
from compress.group import Group
from dear import _C

#: What an element is on the wire, and how many bytes it takes.
WIDTHS = {torch.bfloat16: 2, torch.float16: 2, torch.float8_e4m3fn: 1, torch.int8: 1}


class Dense(Compressor):
    """The mean gradient with a wire format of 16 or 8 bits: rounded once by each rank, summed in float32 by the shard's
    owner, and rounded once more. A 16-bit all-reduce sends the same bytes and rounds at every hop.

    In 8 bits, blocks of 128 elements share one scale, a power of two that travels with them (1 byte): bytes are half of
    those of 16 bits, and 0.8% more. With error feedback, which is the default there, what rounding lost is sent later.
    Without, both roundings are stochastic: right in the mean, from a seed, so that a resumed run draws the same.

    Without error feedback, values beyond float16's range (65504) count as not finite; with it, they are sent in parts.
    In 8 bits, so do values beyond 2^126.

    Args:
        dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float8_e4m3fn`` or ``torch.int8``.
        error_feedback: keeps what rounding lost, at both roundings. None: in 8 bits only.
        Others: see :class:`compress.Compressor`.

    Source of scaled blocks: Open Compute Project, "Microscaling Formats (MX) Specification", 2023.
    """

    exchange: ClassVar[Literal["sum", "owners", "gather"]] = "owners"
    part_numel: ClassVar[int | None] = 1 << 20

    def __init__(
        self, dtype: torch.dtype = torch.bfloat16, *, error_feedback: bool | None = None, **options: Any
    ) -> None:
        if dtype not in WIDTHS:
            raise ValueError(
                f"dtype must be torch.bfloat16, torch.float16, torch.float8_e4m3fn or torch.int8, not {dtype!r}."
            )
        self.dtype, self.eight_bits = dtype, WIDTHS[dtype] == 1
        super().__init__(error_feedback=self.eight_bits if error_feedback is None else error_feedback, **options)

    @property
    def usual_ratio(self) -> float:  # type: ignore[override]  # of a class, elsewhere
        return 4.0 / WIDTHS[self.dtype]

    def options(self) -> dict[str, Any]:
        return {"dtype": str(self.dtype)}

    def ratio(self, group: Group) -> float:
        if not self.eight_bits:
            return self.usual_ratio
        return group.numel / (group.world * ops.quantize_payload_numel(self.shard_numel(group)))

    def shard_numel(self, group: Group) -> int:
        """Whole 32-bit words, of the scales too."""
        share = -(-group.numel // group.world)
        return ops.quantize_shard_numel(share) if self.eight_bits else -(-share // 2) * 2

    def native(self, group: Group) -> _C.Codec:
        arguments = {"shard": self.shard_numel(group), **self.codec_arguments(group)}
        if not self.eight_bits:
            return _C.HalfCodec(dtype=self.dtype, **arguments)
        seed = zlib.crc32(repr((self.seed, group.names)).encode())
        return _C.QuantizedCodec(floating=self.dtype.is_floating_point, seed=seed, **arguments)
