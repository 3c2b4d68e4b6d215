"""Plain-torch golden model of gradients in 2, 3 or 4 bits, to be read beside :mod:`compress.reference`."""

from typing import NamedTuple

import torch
from torch import Tensor

from compress.reference import correct

#: Elements that share one step; tests compare it with the kernels' own.
STEP_BLOCK = 128
#: Beyond it, an element counts as not finite.
LARGEST = 2.0**118
#: A block whose largest element is smaller sends nothing.
SMALLEST = 2.0**-100
#: By bits: the step, to the sum of squares by the sum of the magnitudes.
FACTORS = {2: 0.98, 3: 0.5625, 4: 0.3125}


class Levelled(NamedTuple):
    """``levels`` [n] int64, whole numbers from -k to k, and ``steps`` [blocks] float32."""

    levels: Tensor
    steps: Tensor

    def decoded(self) -> Tensor:
        """[n] float32."""
        return self.levels.float() * _each(self.steps, self.levels.numel()) + 0.0


def _each(of_blocks: Tensor, numel: int) -> Tensor:
    return of_blocks.repeat_interleave(STEP_BLOCK)[:numel]


def limit(bits: int) -> int:
    """k: of the outermost level."""
    return 2 ** (bits - 1) - 1


def steps_of(values: Tensor, bits: int) -> Tensor:
    """The step of each block of ``values`` [n] float32."""
    blocks = -(-values.numel() // STEP_BLOCK)
    padded = torch.zeros(blocks * STEP_BLOCK)
    padded[: values.numel()] = values.abs()
    rows = padded.view(blocks, STEP_BLOCK)
    largest = rows.amax(1)
    sends = largest >= SMALLEST
    largest = torch.where(sends, largest, 1.0)
    # Magnitudes as whole numbers, of which the largest has 11 bits.
    unit = torch.ldexp(torch.ones(blocks), torch.frexp(largest).exponent - 11)
    whole = (rows.double() / unit.double()[:, None]).long()
    total, squares = whole.sum(1), whole.square().sum(1)
    total = torch.where(sends, total, 1)
    fine = squares.float() / total.float() * torch.tensor(FACTORS[bits]) * unit
    step = torch.minimum(fine, largest / limit(bits))
    upper = (step.view(torch.int32) + 0x8000 & ~0xFFFF).view(torch.float32)  # rounded to 16 bits
    return torch.where(sends, upper, 0.0)


def quantize(values: Tensor, bits: int) -> Levelled:
    """``values`` [n] float32, each as the nearest level; what is beyond the outermost is cut off."""
    steps = steps_of(values, bits)
    inverse = torch.where(steps > 0, 1.0 / steps, 0.0)
    scaled = values * _each(inverse, values.numel())
    return Levelled(scaled.clamp(-limit(bits), limit(bits)).round().long(), steps)


def encode(grad: Tensor, error: Tensor | None, bits: int) -> tuple[Levelled, Tensor, int]:
    """The gradient plus the error, what rounding lost, and how many elements were dropped."""
    corrected, dropped = correct(grad, error, LARGEST)
    said = quantize(corrected, bits)
    return said, corrected - said.decoded(), dropped


def average(payloads: list[Levelled], error: Tensor | None, bits: int) -> tuple[Levelled, Tensor, int]:
    """:func:`encode` of the mean, summed in float32 in order of the ranks, scaled as in 16 bits."""
    ranks, total = len(payloads), torch.zeros(payloads[0].levels.numel())
    scale = 0.5 ** (ranks - 1).bit_length()
    for payload in payloads:
        total = total + payload.decoded() * scale
    return encode(total / (ranks * scale), error, bits)


def row(said: Levelled, bits: int, shard: int) -> Tensor:
    """An owner's row of a shard, int32: a code is level + k. Its lower 2 bits (of 4: all) are one field of each block
    of elements, a third bit another; element i of a block is in word i % (4 f) of a field of f bits, at place i / (4 f)
    of the word. Behind the fields of all blocks are the upper halves of the steps."""
    codes = torch.full((shard,), limit(bits))
    codes[: said.levels.numel()] += said.levels
    steps = torch.zeros(shard // STEP_BLOCK)
    steps[: said.steps.numel()] = said.steps
    words = []
    for width, shift in [(2, 0), (1, 2)] if bits == 3 else [(bits, 0)]:
        parts = (codes >> shift & 2**width - 1).view(-1, 32 // width, 4 * width)
        words.append((parts << width * torch.arange(32 // width)[:, None]).sum(1))
    halves = (steps.view(torch.int32).long() >> 16 & 0xFFFF).view(-1, 2)
    packed = torch.cat([torch.cat(words, 1).flatten(), halves[:, 0] | halves[:, 1] << 16])
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()
