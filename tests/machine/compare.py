"""Whether two runs of a case noted the same values: bit for bit, or as nearly as rounding allows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import torch

FACTOR = 8.0  # by how much two ways to round may differ more than one of them and exact arithmetic
FLOOR = 1e-5  # of a value's size, and absolute: a few roundings of float32
COARSE = 2**-8  # the same behind a pass under autocast: what float64 does says nothing of roundings to bfloat16
PRINTED = 2e-4  # the same of a value in a text, which is printed with four decimals
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|inf|nan)(?![\w.])")
LOOKS = re.compile(r"\s+|,? dtype=torch\.\w+")  # how a text is laid out: lines, and what type its numbers have


Notes = list[tuple[int, Any]]  #: the piece of the program, and a value


class Rounding:
    """How far apart the values of two runs may be that round otherwise.

    Rounding is as large as its effect. An optimizer that divides a gradient by its size makes a step of a gradient that
    is nothing but rounding, as that of an attention's key bias, and step by step such a value wanders. So the same
    program is run by plain DDP in float64, too: where float32 and float64 part, rounding decides, and so much more
    may be between two runs in float32.

    coarse: the first piece that computes in bfloat16, if one does.
    """

    def __init__(self, want: Notes, twin: Notes, coarse: int | None = None) -> None:
        self._twin = twin
        self._coarse = [coarse is not None and piece >= coarse for piece, _ in want]
        pairs = zip(want, twin, strict=False)
        self._complete = len(twin) >= len(want) and all(a[0] == b[0] for a, b in pairs)

    def allows(self, index: int, have: Any, want: Any) -> bool:
        """Whether the note at ``index`` may be this in place of that. What is no number in a text must be equal."""
        (mine, rest), (theirs, other) = _numbers(have), _numbers(want)
        if rest != other or mine.shape != theirs.shape:
            return False
        finite = theirs[torch.isfinite(theirs)]
        size = finite.abs().max().item() if finite.numel() else 0.0
        bound = (PRINTED if other else FLOOR) * (1 + size)
        if self._coarse[index]:
            bound = max(bound, COARSE * (1 + size))
        if self._complete and (twin := _numbers(self._twin[index][1])[0]).shape == theirs.shape:
            apart = (twin - theirs).abs()
            if apart.numel() and bool(torch.isfinite(apart).all()):
                bound += FACTOR * apart.max().item()
        return torch.allclose(mine, theirs, rtol=0.0, atol=bound, equal_nan=True)


def _numbers(note: torch.Tensor | str) -> tuple[torch.Tensor, str]:
    """What rounding may change in a note, and what it says beside that."""
    if isinstance(note, torch.Tensor):
        return note.double(), ""
    text = LOOKS.sub("", note)
    return torch.tensor([float(each) for each in NUMBER.findall(text)], dtype=torch.float64), NUMBER.sub("#", text)


def leaves(value: Any) -> Iterator[Any]:
    """The tensors and other values in lists and dicts; the order in which keys came into a dict does not count.
    A float, and a list of floats such as a tensor's, is a tensor: whether it was rounded otherwise is asked of all."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from leaves(value[key])
    elif (floats := _floats(value)) is not None:
        yield torch.tensor(floats, dtype=torch.float64)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from leaves(each)
    else:
        yield value


def _floats(value: Any) -> list[float] | None:
    """Those of a float or of nested lists of floats; None where there is none, or anything else among them."""
    if isinstance(value, float):
        return [value]
    if not isinstance(value, (list, tuple)) or not value:
        return None
    parts = [_floats(each) for each in value]
    return None if None in parts else [number for part in parts for number in part or ()]


def _same(index: int, have: Any, want: Any, rounding: Rounding | None) -> bool:
    """Equal bits, or up to ``rounding``; NaN equals NaN."""
    if isinstance(want, torch.Tensor) != isinstance(have, torch.Tensor):
        return False
    if not isinstance(want, torch.Tensor):
        texts = isinstance(have, str) and isinstance(want, str)
        return bool(have == want) or (texts and rounding is not None and rounding.allows(index, have, want))
    if have.shape != want.shape or have.dtype != want.dtype:
        return False
    if rounding is not None and want.is_floating_point():
        return rounding.allows(index, have, want)
    return torch.allclose(have, want, rtol=0.0, atol=0.0, equal_nan=True)


def compare(have: Notes, want: Notes, complete: int | None, rounding: Rounding | None = None) -> tuple[int, str] | None:
    """The piece at which they differ and how, or None. ``complete``: how many pieces both went through to the end."""
    for index, ((piece, mine), (other, theirs)) in enumerate(zip(have, want, strict=False)):
        if piece != other:
            return min(piece, other), "notes another number of values"
        if not _same(index, mine, theirs, rounding):
            if isinstance(mine, torch.Tensor) and mine.shape == theirs.shape:
                return piece, f"differs by {(mine.double() - theirs.double()).abs().max().item():.3g}"
            return piece, f"{_short(mine)} instead of {_short(theirs)}"
    if complete is not None and len(have) != len(want):
        return complete, f"notes {len(have)} values instead of {len(want)}"
    return None


def digest(note: Any) -> str:
    """A few letters for a noted value, the same for the same bits."""
    if isinstance(note, torch.Tensor):
        note = f"{note.dtype} {list(note.shape)}".encode() + _bytes(note)
    return hashlib.sha256(note if isinstance(note, bytes) else repr(note).encode()).hexdigest()[:12]


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _short(value: Any) -> str:
    return f"{type(value).__name__} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:80]
