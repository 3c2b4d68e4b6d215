"""What ranks and owners make of a group's gradients in few bits, step by step, in plain torch, with error feedback."""

from typing import Any

import torch
from torch import Tensor

from compress import reference_levels, reference_quantize
from compress.reference_levels import STEP_BLOCK, Levelled
from compress.reference_quantize import SCALE_BLOCK, Quantized


class Golden:
    """One group of all ranks: each rounds, the owner of a shard averages and rounds again."""

    def __init__(self, numel: int, shard: int, world: int) -> None:
        self.errors = [torch.zeros(numel) for _ in range(world)]
        self.ranges = [(min(r * shard, numel), min((r + 1) * shard, numel)) for r in range(world)]
        self.owned = [torch.zeros(end - begin) for begin, end in self.ranges]

    def step(self, grads: list[Tensor]) -> Tensor:
        said, result = [], torch.zeros_like(grads[0])
        for rank, grad in enumerate(grads):
            one, self.errors[rank], _ = self.encode(grad, self.errors[rank])
            said.append(one)
        for owner, (begin, end) in enumerate(self.ranges):
            rows = [self.part(one, begin, end) for one in said]
            result[begin:end], self.owned[owner] = self.average(rows, self.owned[owner], begin, end)
        return result

    def encode(self, grad: Tensor, error: Tensor) -> tuple[Any, Tensor, int]:
        raise NotImplementedError

    def part(self, said: Any, begin: int, end: int) -> Any:
        raise NotImplementedError

    def average(self, rows: list[Any], error: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """The decoded mean, and what it lost."""
        raise NotImplementedError


class EightBits(Golden):
    def __init__(self, numel: int, shard: int, world: int, dtype: torch.dtype) -> None:
        super().__init__(numel, shard, world)
        self.dtype = dtype

    def encode(self, grad, error):
        return reference_quantize.encode(grad, error, self.dtype)

    def part(self, said, begin, end):
        return Quantized(said.codes[begin:end], said.scales[begin // SCALE_BLOCK : -(-end // SCALE_BLOCK)])

    def average(self, rows, error, begin, end):
        merged, left, _ = reference_quantize.average(rows, error, self.dtype)
        return merged.decoded(self.dtype), left


class FewBits(Golden):
    """``scales``: a scale for each element, from past results."""

    def __init__(self, numel: int, shard: int, world: int, bits: int, scales: bool = False) -> None:
        super().__init__(numel, shard, world)
        self.bits = bits
        self.squares = torch.zeros(numel) if scales else None

    def step(self, grads):
        self.scales = None if self.squares is None else reference_levels.scales_of(self.squares)
        result = super().step(grads)
        if self.squares is not None:
            self.squares = reference_levels.learned(self.squares, result)
        return result

    def encode(self, grad, error):
        return reference_levels.encode(grad, error, self.bits, self.scales)

    def part(self, said, begin, end):
        return Levelled(said.levels[begin:end], said.steps[begin // STEP_BLOCK : -(-end // STEP_BLOCK)])

    def average(self, rows, error, begin, end):
        scales = None if self.scales is None else self.scales[begin:end]
        merged, left, _ = reference_levels.average(rows, error, self.bits, scales)
        return merged.decoded(scales), left
