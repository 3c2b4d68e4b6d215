"""Plain-torch golden model of gradients in 2, 3 or 4 bits, to be read beside :mod:`compress.reference`."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from compress.reference import correct

#: Elements that share one step; tests compare it with the kernels' own.
STEP_BLOCK = 128
#: Beyond it, an element counts as not finite.
LARGEST = 2.0**100
#: A block whose largest element is smaller sends nothing.
SMALLEST = 2.0**-100
#: By bits: the step, to the sum of squares by the sum of the magnitudes.
FACTORS = {2: 0.98, 3: 0.4375, 4: 0.3125}
#: The same where elements have scales of their own.
SCALED_FACTORS = {2: 0.98, 3: 0.5, 4: 0.625}


#: No element's scale is below its block's mean by more than this.
BELOW_MEAN = 8
#: What the square of a new result weighs in the running mean.
NEW_WEIGHT = 1 / 16
#: A larger result counts as this, and a smaller mean square as 0.
LARGEST_RESULT, SMALLEST_SQUARE = 2.0**60, 2.0**-100


class Levelled(NamedTuple):
    """``levels`` [n] int64, in steps: from -k to k, in 3 bits 0, ±1, ±2 and ±4; and ``steps`` [blocks] float32."""

    levels: Tensor
    steps: Tensor

    def decoded(self, scales: Tensor | None = None) -> Tensor:
        """[n] float32; ``scales`` [n]: by which it was divided."""
        values = self.levels.float() * _each(self.steps, self.levels.numel()) + 0.0
        return values if scales is None else values * scales


def _each(of_blocks: Tensor, numel: int) -> Tensor:
    return of_blocks.repeat_interleave(STEP_BLOCK)[:numel]


def limit(bits: int) -> int:
    """k: how many levels there are on each side of 0."""
    return 2 ** (bits - 1) - 1


def reach(bits: int) -> int:
    """The outermost level, in steps."""
    return 4 if bits == 3 else limit(bits)


def steps_of(values: Tensor, bits: int, scaled: bool = False) -> Tensor:
    """The step of each block of ``values`` [n] float32."""
    factor = (SCALED_FACTORS if scaled else FACTORS)[bits]
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
    fine = squares.float() / total.float() * torch.tensor(factor) * unit
    step = torch.minimum(fine, largest / reach(bits))
    upper = (step.view(torch.int32) + 0x8000 & ~0xFFFF).view(torch.float32)  # rounded to 16 bits
    return torch.where(sends, upper, 0.0)


def quantize(values: Tensor, bits: int, scaled: bool = False) -> Levelled:
    """``values`` [n] float32, each as the nearest level; what is beyond the outermost is cut off."""
    steps = steps_of(values, bits, scaled)
    inverse = torch.where(steps > 0, 1.0 / steps, 0.0)
    quotients = values * _each(inverse, values.numel())
    if bits != 3:
        return Levelled(quotients.clamp(-limit(bits), limit(bits)).round().long(), steps)
    nearest = quotients.clamp(-2, 2).round()
    return Levelled(torch.where(quotients.abs() >= 3, 4 * quotients.sign(), nearest).long(), steps)


def encode(grad: Tensor, error: Tensor | None, bits: int, scales: Tensor | None = None) -> tuple[Levelled, Tensor, int]:
    """The gradient plus the error, what rounding lost, and how many elements were dropped. ``scales`` [n]: as
    :func:`scales_of` gives them."""
    each = torch.ones(grad.numel()) if scales is None else scales
    corrected, dropped = correct(grad.float() / each, None if error is None else error / each, LARGEST)
    said = quantize(corrected, bits, scales is not None)
    return said, (corrected - said.decoded()) * each, dropped


def average(
    payloads: list[Levelled], error: Tensor | None, bits: int, scales: Tensor | None = None
) -> tuple[Levelled, Tensor, int]:
    """:func:`encode` of the mean, summed in float32 in order of the ranks, scaled as in 16 bits."""
    ranks, total = len(payloads), torch.zeros(payloads[0].levels.numel())
    scale = 0.5 ** (ranks - 1).bit_length()
    for payload in payloads:
        total = total + payload.decoded(scales) * scale
    return encode(total / (ranks * scale), error, bits, scales)


def scales_of(squares: Tensor) -> Tensor:
    """The scale of each element, a power of two from 1 on, from running means ``squares`` [n] float32: the power next
    below its root, over the least of its block, which is the block's mean of those powers over :data:`BELOW_MEAN`."""
    n = squares.numel()
    blocks = -(-n // STEP_BLOCK)
    roots = (torch.frexp(squares).exponent.long() - 1).div(2, rounding_mode="floor")
    exponents = torch.full((blocks * STEP_BLOCK,), -1000)
    exponents[:n] = torch.where(squares > 0, roots, -64)
    rows = exponents.view(blocks, STEP_BLOCK)
    largest, counts = rows.amax(1), torch.full((blocks,), STEP_BLOCK)
    counts[-1] = n - (blocks - 1) * STEP_BLOCK
    # As whole numbers, of which the largest is 2^16.
    mean = (2.0 ** (16 + rows - largest[:, None]).double()).floor().sum(1).long() // counts
    least = largest - 16 + mean.double().log2().floor().long() - int(math.log2(BELOW_MEAN))
    return 2.0 ** (exponents[:n] - _each(least, n)).clamp(min=0)


def first_squares(results: Tensor) -> Tensor:
    """The running means behind dense steps, from the last one's ``results`` [n], all finite, rounded to bfloat16."""
    held = results.bfloat16().float().clamp(-LARGEST_RESULT, LARGEST_RESULT)
    return torch.where(held * held >= SMALLEST_SQUARE, held * held, 0.0)


def learned(squares: Tensor, results: Tensor) -> Tensor:
    """The running means with the results [n] taken in."""
    held = results.abs().clamp(max=LARGEST_RESULT)
    after = squares + (held * held - squares) * NEW_WEIGHT
    return torch.where(after >= SMALLEST_SQUARE, after, 0.0)


def row(said: Levelled, bits: int, shard: int) -> Tensor:
    """An owner's row of a shard, int32: a code is the level's number + k. Its lower 2 bits (of 4: all) are one field of
    each block of elements, a third bit another; element i of a block is in word i % (4 f) of a field of f bits, at
    place i / (4 f) of the word. Behind the fields of all blocks are the upper halves of the steps."""
    codes = torch.full((shard,), limit(bits))
    codes[: said.levels.numel()] += said.levels.clamp(-limit(bits), limit(bits))
    steps = torch.zeros(shard // STEP_BLOCK)
    steps[: said.steps.numel()] = said.steps
    words = []
    for width, shift in [(2, 0), (1, 2)] if bits == 3 else [(bits, 0)]:
        parts = (codes >> shift & 2**width - 1).view(-1, 32 // width, 4 * width)
        words.append((parts << width * torch.arange(32 // width)[:, None]).sum(1))
    halves = (steps.view(torch.int32).long() >> 16 & 0xFFFF).view(-1, 2)
    packed = torch.cat([torch.cat(words, 1).flatten(), halves[:, 0] | halves[:, 1] << 16])
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()
