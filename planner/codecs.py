"""What compressors send, and what they cost: payloads from the shapes of parameters, times per byte of gradient."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import compress
from compress.presets import START
from compress.ranks import Rank, rank_for

from .profile import Piece


@dataclass(frozen=True)
class Cost:
    """Seconds per byte of gradient, on the thread where each runs: encode on the one that computes, merge on a
    lane's, decode on its own."""

    encode: float = 0.0
    merge: float = 0.0
    decode: float = 0.0


FREE = Cost()


@dataclass(frozen=True)
class Codec(ABC):
    """How gradients become messages. name: as the benchmarks spell it. code: what a user writes, "" for none."""

    name: str
    code: str

    @abstractmethod
    def rounds(self, pieces: Sequence[Piece]) -> tuple[float, ...]:
        """Bytes of each round, of which each is an all-to-all and an all-gather. An average over steps."""

    @property
    def start(self) -> int:
        """Steps in the beginning, in which what ``code`` says sends more than ``rounds``."""
        return START if self.name in STARTING else 0

    @property
    def keeps_error(self) -> bool:
        """Whether what ``code`` says has error feedback, a number for each parameter."""
        return True

    @property
    def shrinks(self) -> float:
        """About how many times smaller gradients become, as far as it is known beforehand."""
        return 1.0


@dataclass(frozen=True)
class Dense(Codec):
    """Every element. share: of the gradient's bytes."""

    share: float = 1.0
    feedback: bool | None = None  # whether it has error feedback; None: as its format has where nobody says

    def rounds(self, pieces: Sequence[Piece]) -> tuple[float, ...]:
        return (self.share * sum(piece.bytes for piece in pieces),)

    @property
    def keeps_error(self) -> bool:
        return self.share < 0.5 if self.feedback is None else self.feedback

    @property
    def shrinks(self) -> float:
        return 1 / self.share


@dataclass(frozen=True)
class TopK(Codec):
    """A share of the elements, with an index each, in slots of which a part stays empty."""

    density: float = 0.01
    slack: float = 1.25

    def rounds(self, pieces: Sequence[Piece]) -> tuple[float, ...]:
        return (2 * self.density * self.slack * sum(piece.bytes for piece in pieces),)

    @property
    def shrinks(self) -> float:
        return 16.0


@dataclass(frozen=True)
class LowRank(Codec):
    """Factors of each matrix: both in turn within a step, or one a step. What would not shrink travels dense."""

    rank: Rank = 4
    both: bool = True
    factor_bytes: float = 2.0

    def rounds(self, pieces: Sequence[Piece]) -> tuple[float, ...]:
        left = right = dense = 0.0
        for piece in pieces:
            elements = math.prod(piece.shape)
            rows = piece.shape[0] if len(piece.shape) > 1 else elements
            columns = elements // rows
            rank = rank_for(self.rank, rows, columns, 1 / 8 if self.both else 1 / 4, self._each(rows + columns))
            if len(piece.shape) < 2 or rank * (rows + columns) >= elements:
                dense += piece.bytes
            else:
                left += rank * rows * self.factor_bytes
                right += rank * columns * self.factor_bytes
        return (left + dense, right) if self.both else ((left + right) / 2 + dense,)

    def _each(self, sides: int) -> float:
        """Elements that a rank of 1 sends in a step."""
        return sides if self.both else sides / 2

    @property
    def shrinks(self) -> float:
        return 16.0


EXACT = Dense("dense", "")
SCALE_BITS, SCALED_TOGETHER = 16, 128  # of gradients in 4 bits and fewer: a scale for each block
PRESET = 'compress.preset("{}")'
STARTING = ("safe", "fast")  # presets that send more in the first steps
HALF = Dense("bf16", "compress.Dense(torch.bfloat16)", 0.5)


def codec(name: str) -> Codec:
    """The compressor that the benchmarks call so: dense, bf16, fp16, int8, fp8, int4, int3, int2, sign, exact, safe,
    fast, topk:0.01, power:4, acp:4.

    Raises ValueError.
    """
    kind, _, option = name.partition(":")
    try:
        match kind:
            case "dense":
                return EXACT
            case "bf16" | "fp16":
                return Dense(name, f"compress.Dense(torch.{'b' * (kind == 'bf16')}float16)", 0.5)
            case "int8" | "fp8":
                dtype = {"int8": "int8", "fp8": "float8_e4m3fn"}[kind]
                return Dense(name, f"compress.Dense(torch.{dtype})", 0.25 + 1 / 128)  # a scale for each 128
            case "int4" | "int3" | "int2":
                bits = int(kind[3:]) + SCALE_BITS / SCALED_TOGETHER
                return Dense(name, f"compress.Dense(torch.{kind})", bits / 32)
            case "sign":
                return Dense(name, "compress.SignSGD()", 1 / 32)
            case "topk" if 0 < float(option) <= 1:
                return TopK(name, f"compress.TopK(density={option})", float(option))
            case "exact":
                return Dense(name, PRESET.format(name), 0.5, feedback=True)
            case "safe":  # once it has begun, as the next
                return Dense(name, PRESET.format(name), (3 + SCALE_BITS / SCALED_TOGETHER) / 32)
            case "fast":
                return LowRank(name, PRESET.format(name), "8x", factor_bytes=1 + 1 / SCALED_TOGETHER)
            case "power" | "acp":
                kind_name = {"power": "PowerSGD", "acp": "ACPSGD"}[kind]
                rank = _rank(option)
                return LowRank(name, f"compress.{kind_name}(rank={rank!r})", rank, both=kind == "power")
    except ValueError:
        pass
    raise ValueError(
        f"Compressor {name!r} is not known: name dense, bf16, fp16, int8, fp8, int4, int3, int2, sign, exact, safe, "
        "fast, topk:DENSITY, power:RANK or acp:RANK."
    )


def _rank(option: str) -> Rank:
    """8, 0.125 and 4.5x. Raises ValueError."""
    if option.endswith("x"):
        if not 1 < float(option[:-1]) < math.inf:
            raise ValueError(option)
        return option
    rank = int(option) if option.isdigit() else float(option)
    if not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1):
        raise ValueError(option)
    return rank


def compressor(name: str, steady: bool = True) -> Any:
    """A new one, of the name that :func:`codec` takes. steady: a preset sends from its first step on what it will send
    in the end. Raises ValueError."""
    codec(name)
    kind, _, option = name.partition(":")
    match kind:
        case "power":
            return compress.PowerSGD(rank=_rank(option))
        case "acp":
            return compress.ACPSGD(rank=_rank(option))
        case "topk":
            return compress.TopK(density=float(option))
        case "sign":
            return compress.SignSGD()
        case "exact" | "safe" | "fast":
            return compress.preset(kind, **({"start_step": 0} if steady else {}))
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}.get(kind, kind)
    if kind == EXACT.name:
        raise ValueError(f"{name!r} names no compressor: gradients go as they are.")
    return compress.Dense(getattr(torch, dtype))
