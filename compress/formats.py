"""What an element of :class:`compress.Dense` is on the wire, by torch's type of that name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from compress import ops
from dear import _C


@dataclass(frozen=True)
class Format(ABC):
    """One wire format: how long its rows are, and which codec writes them."""

    dtype: torch.dtype
    bits: int  # of an element, without its share of a scale

    #: Whether :class:`compress.Dense` keeps what rounding lost, where it is not told.
    error_feedback = True
    #: Whether elements may have scales of their own: its codec takes their mean squares.
    scales_elements = False
    #: Whether vectors are exempt, where :class:`compress.Dense` is not told.
    exempts_vectors = False

    @abstractmethod
    def shard_numel(self, share: int) -> int:
        """The smallest shard of at least so many elements that is whole words, of its scales too."""

    @abstractmethod
    def row_words(self, shard: int) -> int:
        """int32 words of an owner's row."""

    @abstractmethod
    def codec(self, seed: int, **arguments: Any) -> _C.Codec:
        """The native codec. ``seed``: of what is drawn, where rounding is stochastic."""


class SixteenBits(Format):
    """A float for itself."""

    error_feedback = False

    def shard_numel(self, share: int) -> int:
        return -(-share // 2) * 2

    def row_words(self, shard: int) -> int:
        return shard // 2

    def codec(self, seed: int, **arguments: Any) -> _C.Codec:
        return _C.HalfCodec(dtype=self.dtype, **arguments)


class EightBits(Format):
    """A byte, and a scale for each block."""

    def shard_numel(self, share: int) -> int:
        return ops.quantize_shard_numel(share)

    def row_words(self, shard: int) -> int:
        return ops.quantize_payload_numel(shard)

    def codec(self, seed: int, **arguments: Any) -> _C.Codec:
        return _C.QuantizedCodec(floating=self.dtype.is_floating_point, seed=seed, **arguments)


class FewBits(Format):
    """A level, and a step for each block."""

    scales_elements = True
    exempts_vectors = True

    def shard_numel(self, share: int) -> int:
        return ops.quantize_shard_numel(share)

    def row_words(self, shard: int) -> int:
        return ops.levels_payload_numel(shard, self.bits)

    def codec(self, seed: int, **arguments: Any) -> _C.Codec:
        return _C.LevelledCodec(bits=self.bits, **{"squares": None, **arguments})


FORMATS: dict[torch.dtype, Format] = {
    one.dtype: one
    for one in (
        SixteenBits(torch.bfloat16, 16),
        SixteenBits(torch.float16, 16),
        EightBits(torch.float8_e4m3fn, 8),
        EightBits(torch.int8, 8),
        FewBits(torch.int4, 4),  # type: ignore[attr-defined] # not in the stubs
        FewBits(torch.int3, 3),  # type: ignore[attr-defined] # not in the stubs
        FewBits(torch.int2, 2),  # type: ignore[attr-defined] # not in the stubs
    )
}


def format_of(dtype: torch.dtype, option: str = "dtype") -> Format:
    """The format that is called so, by the option that names it.

    Raises:
        ValueError: there is none.
    """
    if dtype not in FORMATS:
        *first, last = map(str, FORMATS)
        raise ValueError(f"{option} must be {', '.join(first)} or {last}, not {dtype!r}.")
    return FORMATS[dtype]
