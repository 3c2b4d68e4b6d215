"""Dense: every element, in 16 bits or fewer on the wire."""

from __future__ import annotations

import zlib
from typing import Any, ClassVar, Literal

import torch

from compress.choices import vectors
from compress.compressor import Compressor
from compress.formats import format_of
from compress.group import Group
from compress.squares import Squares
from dear import _C


class Dense(Compressor):
    """The mean gradient with a wire format of 16 to 2 bits: rounded once by each rank, summed in float32 by the shard's
    owner, and rounded once more. A 16-bit all-reduce sends the same bytes and rounds at every hop.

    In 8 bits, blocks of 128 elements share one scale, a power of two that travels with them (1 byte): bytes are half of
    those of 16 bits, and 0.8% more. With error feedback, which is the default there, what rounding lost is sent later.
    Without, both roundings are stochastic: right in the mean, from a seed, so that a resumed run draws the same.

    In 4, 3 or 2 bits an element is one of 15, 7 or 3 levels around 0, a step apart (in 3 bits the outermost two steps),
    and blocks of 128 share a step of 16 bits: 3.9, 5.1 or 7.5 times fewer bytes than 16 bits. The step is chosen for a
    small error; what lies beyond the outermost levels is sent in parts, with error feedback, which is the default here
    too; without, it is lost. Where ``exempt`` is not given, vectors are: biases and weights of norms, few as they are,
    do not bear so few bits.

    There, ``scale="element"`` divides each element by a scale of its own before it is rounded: a power of two near the
    root of the running mean of the squares of its past results (weights of 1/16), but not far below its block's mean.
    An element that is small beside its neighbours is then rounded as finely as they are. Steps are coarser there, so
    that less is sent late. Every rank computes the scales from the results, so they cost no bytes; they cost 4 bytes of
    memory an element on every rank, which are saved. Behind the steps before ``start_step`` the means begin with the
    squares of the last one's results; without, or where these were not finite, all elements of a block are equal at
    first. A compressed step whose gradients are not finite changes no scale.

    The steps before ``start_step`` are sent in float32, or in ``start_dtype``: training is most easily disturbed at
    first, and 8 bits do so less than 3 and send less than 32.

    Without error feedback, values beyond float16's range (65504) count as not finite; with it, they are sent in parts.
    In 8 bits, so do values beyond 2^126, and in fewer, beyond 2^100.

    Args:
        dtype: ``torch.bfloat16``, ``torch.float16``, ``torch.float8_e4m3fn``, ``torch.int8``, ``torch.int4``,
            ``torch.int3`` or ``torch.int2``.
        scale: ``"block"``, or in 4 bits and fewer ``"element"``.
        start_dtype: of the steps before ``start_step``, any that ``dtype`` may be; None: float32.
        error_feedback: keeps what rounding lost, at both roundings. None: in 8 bits and fewer.
        exempt: as in :class:`compress.Compressor`, but in 4 bits and fewer all vectors where it is not given; ``()``:
            none.
        Others: see :class:`compress.Compressor`.

    Source of scaled blocks: Open Compute Project, "Microscaling Formats (MX) Specification", 2023.
    """

    exchange: ClassVar[Literal["sum", "owners", "gather"]] = "owners"
    part_numel: ClassVar[int | None] = 1 << 20

    def __init__(
        self,
        dtype: torch.dtype = torch.bfloat16,
        *,
        scale: Literal["block", "element"] = "block",
        start_dtype: torch.dtype | None = None,
        error_feedback: bool | None = None,
        **options: Any,
    ) -> None:
        self.dtype, self.format = dtype, format_of(dtype)
        self.start_dtype = start_dtype
        self.first = None if start_dtype is None else format_of(start_dtype, "start_dtype")
        if self.first is not None and options.get("start_step", 0) == 0:
            raise ValueError("start_dtype is of the steps before start_step, which is 0: give start_step, too.")
        if scale not in ("block", "element"):
            raise ValueError(f'scale must be "block" or "element", not {scale!r}.')
        if scale == "element" and not self.format.scales_elements:
            raise ValueError(f'scale="element" is for torch.int4, torch.int3 and torch.int2, not {dtype}.')
        self.scale, self.squares = scale, Squares()
        if error_feedback is None:
            error_feedback = self.format.error_feedback
        if self.format.exempts_vectors:
            options.setdefault("exempt", vectors)
        super().__init__(error_feedback=error_feedback, **options)

    @property
    def usual_ratio(self) -> float:  # type: ignore[override]  # of a class, elsewhere
        return 32 / self.format.bits

    def options(self) -> dict[str, Any]:
        own: dict[str, Any] = (
            {} if self.scale == "block" else {"scale": self.scale}
        )  # earlier states say nothing of these
        own |= {} if self.first is None else {"start_dtype": str(self.start_dtype)}
        return {"dtype": str(self.dtype), **own}

    def ratio(self, group: Group) -> float:
        return group.numel / (group.world * self.format.row_words(self.shard_numel(group)))

    def shard_numel(self, group: Group) -> int:
        """Whole 32-bit words, of the scales too; the same in all steps, since owners keep an error feedback."""
        share = -(-group.numel // group.world)
        return max(each.shard_numel(share) for each in (self.format, self.first) if each is not None)

    def before_start(self, group: Group) -> _C.Codec:
        if self.first is None:
            return super().before_start(group)
        return self.first.codec(self._seed_of(group), **self._arguments(group))

    def natives(self, group: Group) -> list[tuple[int, _C.Codec]]:
        arguments = self._arguments(group)
        if self.scale == "element":
            arguments["squares"] = self.squares.allocate(group.members, group.device)
            group.feedback.append(arguments["squares"])  # so that a step with non-finite gradients leaves it alone
        return [(0, self.format.codec(self._seed_of(group), **arguments))]

    def _arguments(self, group: Group) -> dict[str, Any]:
        return {"shard": self.shard_numel(group), **self.codec_arguments(group)}

    def _seed_of(self, group: Group) -> int:
        return zlib.crc32(repr((self.seed, group.names)).encode())

    def named_state(self) -> dict[str, Any]:
        return self.squares.state()

    def load_named_state(self, state: dict[str, Any]) -> None:
        self.squares.load(state)
