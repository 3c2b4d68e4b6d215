"""Plain-torch golden model of gradients in 8 bits, to be read beside :mod:`compress.reference`."""

from typing import NamedTuple

import torch
from torch import Tensor

from compress.reference import correct

#: Elements that share one scale; tests compare it with the kernels' own.
SCALE_BLOCK = 128
#: Beyond it, an element counts as not finite: no decoded value can then overflow.
LARGEST = 2.0**126


class Quantized(NamedTuple):
    """``codes`` [n] uint8, and ``scales`` [blocks] uint8: b for 2^(b - 127), 0 for a block of zeros."""

    codes: Tensor
    scales: Tensor

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """[n] float32."""
        return self.codes.view(dtype).float() * _each(self.scales, self.codes.numel()) + 0.0


def _each(scales: Tensor, numel: int) -> Tensor:
    powers = torch.where(scales > 0, 2.0 ** (scales.double() - 127), 0.0)
    return powers.repeat_interleave(SCALE_BLOCK)[:numel].float()


def uniform(indices: Tensor, key: int) -> Tensor:
    """[n] in [0, 1): a hash of 32 bits of each index (int64) and the key."""

    def times(x: Tensor, factor: int) -> Tensor:
        low, high = factor & 0xFFFF, factor >> 16
        return (x * low + ((x * high & 0xFFFF) << 16)) & 0xFFFFFFFF

    x = (times(indices & 0xFFFFFFFF, 0x9E3779B9) + key) & 0xFFFFFFFF
    x = times(x ^ (x >> 16), 0x7FEB352D)
    x = times(x ^ (x >> 15), 0x846CA68B)
    x = x ^ (x >> 16)
    return (x >> 8).float() * 2.0**-24


def quantize(values: Tensor, dtype: torch.dtype, key: int | None = None, first: int = 0) -> Quantized:
    """``values`` [n] float32 in int8 or float8_e4m3fn; stochastically with a key, ``first`` being the first index."""
    n = values.numel()
    blocks = -(-n // SCALE_BLOCK)
    padded = torch.zeros(blocks * SCALE_BLOCK, dtype=torch.float64)
    padded[:n] = values.double()
    largest = padded.abs().view(blocks, SCALE_BLOCK).amax(1)
    top = 127.0 if dtype == torch.int8 else 448.0
    # The smallest power of two by which the largest is within the range; not below the smallest normal float.
    fraction, power = torch.frexp(largest / top)
    exponent = torch.where(fraction == 0.5, power - 1, power).clamp(min=-126)
    scales = torch.where(largest > 0, exponent + 127, 0).to(torch.uint8)
    each = _each(scales, n).double()
    scaled = torch.where(each > 0, values.double() / each, values.double())
    if key is None:
        rounded = scaled.round() if dtype == torch.int8 else scaled.float()
        return Quantized(rounded.to(dtype).view(torch.uint8), scales)
    # The distance of the codes, as seen from zero for float8, whose codes have a sign of their own.
    sides = scaled if dtype == torch.int8 else scaled.abs()
    step = torch.ones_like(sides) if dtype == torch.int8 else 2.0 ** (torch.frexp(sides)[1] - 4).clamp(min=-9)
    below = (sides / step).floor()
    up = (sides / step - below).float() > uniform(torch.arange(first, first + n), key)
    rounded = ((below + up) * step).copysign(scaled) if dtype != torch.int8 else below + up
    return Quantized(rounded.to(dtype).view(torch.uint8), scales)


def encode(
    grad: Tensor, error: Tensor | None, dtype: torch.dtype, key: int | None = None, first: int = 0
) -> tuple[Quantized, Tensor, int]:
    """The gradient plus the error, what rounding lost, and how many elements were dropped."""
    corrected, dropped = correct(grad, error, LARGEST)
    said = quantize(corrected, dtype, key, first)
    return said, corrected - said.decoded(dtype), dropped


def average(
    payloads: list[Quantized], error: Tensor | None, dtype: torch.dtype, key: int | None = None
) -> tuple[Quantized, Tensor, int]:
    """:func:`encode` of the mean, summed in float32 in order of the ranks, scaled as in 16 bits."""
    ranks, total = len(payloads), torch.zeros(payloads[0].codes.numel())
    scale = 0.5 ** (ranks - 1).bit_length()
    for payload in payloads:
        total = total + payload.decoded(dtype) * scale
    return encode(total / (ranks * scale), error, dtype, key)
