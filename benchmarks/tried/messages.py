"""What a method sends, and what becomes of it."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Message:
    """Values of this rank, whose mean over the ranks is wanted. float32, any shape, the same on every rank.

    bits: of an element on the wire, at both ends; 32 is exact. unit: what each element is divided by before it is
    rounded, known to every rank; broadcast against the values.
    """

    values: Tensor
    bits: int = 32
    unit: Tensor | None = None


@dataclass(frozen=True)
class Answer:
    """result: the mean, the same on every rank. own: this rank's part of it, so that the mean of what the ranks call
    their own is the result: what an error feedback subtracts. Both of the values' shape."""

    result: Tensor
    own: Tensor
