"""Gradients on their way to the owners of their shards, in 16 or in 8 bits, with error feedback."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from dear import _C

__all__ = ["WIRES", "Wire", "make_wire"]

_CODABLE = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels take


class Wire(ABC):
    """One gradient's way; each rank sends every owner its part, and the owner adds in float32.

    Args:
        dtype: of what is sent.
        feedback: what rounding took from a gradient is added to the next one.
    """

    def __init__(self, dtype: torch.dtype, feedback: bool) -> None:
        self.dtype, self._feedback = dtype, feedback
        self.error: torch.Tensor | None = None  # of this rank's whole gradient

    @abstractmethod
    def encode(self, full: torch.Tensor, world: int) -> torch.Tensor:
        """What is sent of a flat gradient [world * n], by owner: [world, anything]. It may change ``full``."""

    @abstractmethod
    def add(self, received: torch.Tensor, n: int) -> torch.Tensor:
        """The sum [n] in float32 of what every rank has sent to this owner."""


class _Rounded(Wire):
    """In 16 bits."""

    def encode(self, full: torch.Tensor, world: int) -> torch.Tensor:
        if self._feedback and self.error is not None:
            full.add_(self.error)
        sent = full.to(self.dtype)
        if self._feedback:
            error = full - sent.to(full.dtype)
            self.error = torch.where(error.isfinite(), error, 0)  # a gradient that is not finite is not kept
        return sent.view(world, -1)

    def add(self, received: torch.Tensor, n: int) -> torch.Tensor:
        return received.float().sum(0)


class _Quantized(Wire):
    """In 8 bits, and a scale for each block of 128 elements: see :func:`compress.ops.quantize_encode`.

    Its codes are always finite. So a word of each message counts what was not, and the owner's sum says so.
    """

    def encode(self, full: torch.Tensor, world: int) -> torch.Tensor:
        n = full.numel() // world
        shard = _shard(n)
        sent = torch.zeros(world, _C.quantized_words(shard) + 1, dtype=torch.int32, device=full.device)
        if self._feedback and self.error is None:
            self.error = torch.zeros(full.numel(), device=full.device)
        values = full if full.dtype in _CODABLE else full.float()
        for owner in range(world if n else 0):
            part = slice(owner * n, (owner + 1) * n)
            error = None if self.error is None else self.error[part]
            row, dropped = sent[owner : owner + 1, :-1], sent[owner, -1:]
            torch.ops.dear.quantize_encode(values[part], error, shard, row, dropped, self._floating, None)
        return sent

    def add(self, received: torch.Tensor, n: int) -> torch.Tensor:
        total, each = torch.zeros(2, n, device=received.device)
        for row in received if n else ():
            torch.ops.dear.quantize_decode(row[None, :-1], _shard(n), each, self._floating)
            total += each
        return total.fill_(torch.nan) if bool(received[:, -1].any()) else total

    @property
    def _floating(self) -> bool:
        return self.dtype != torch.int8


def _shard(n: int) -> int:
    """The smallest number of elements from ``n`` on that is whole words of codes and of scales."""
    return max(1, -(-n // _C.SCALE_UNIT)) * _C.SCALE_UNIT


WIRES: dict[torch.dtype, type[Wire]] = {
    torch.bfloat16: _Rounded,
    torch.float16: _Rounded,
    torch.int8: _Quantized,
    torch.float8_e4m3fn: _Quantized,
}


def make_wire(dtype: torch.dtype, feedback: bool) -> Wire:
    """The one that sends gradients as this type, one of :data:`WIRES`."""
    return WIRES[dtype](dtype, feedback)
