"""Compressors by what they may cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from compress.compressor import Compressor
from compress.dense import Dense
from compress.power_sgd import PowerSGD
from compress.read_once import options_of


def _safe(**more: Any) -> Compressor:
    options = {"scale": "element", "start_step": START, **more}
    if options["start_step"] != 0:
        options.setdefault("start_dtype", torch.int8)
    return Dense(torch.int3, **options)  # type: ignore[attr-defined] # not in the stubs


#: Steps before "safe" and "fast" send as little as they will, where nobody says.
START = 1000
#: Dense steps of "fast", in which training is disturbed most easily: all of the warm-up would take longest.
FAST_DENSE = 20


def _fast(**more: Any) -> Compressor:
    options = {"rank": "8x", "factor_dtype": torch.int8, "start_step": START, **more}
    start = options["start_step"]
    if "rank" not in more and type(start) is int and start > 0:
        options |= {"rank": [(0, "2x"), (start, "8x")], "start_step": min(FAST_DENSE, start)}
    return PowerSGD(**options)


PRESETS: dict[str, tuple[Any, Callable[..., Compressor]]] = {
    "exact": (Dense, lambda **more: Dense(torch.bfloat16, **{"error_feedback": True, **more})),
    "safe": (Dense, _safe),
    "fast": (PowerSGD, _fast),
}


def preset(name: Literal["exact", "safe", "fast"], **options: Any) -> Compressor:
    """A new compressor, chosen by what was measured (the page "Compression and loss" has the losses).

    - ``"exact"``: every element in 16 bits, rounding kept in the error feedback.
    - ``"safe"``: every element of a matrix in 3 bits, each with a scale of its own, and vectors exactly: 5 times fewer
      bytes than 16 bits. The first ``start_step`` steps, 1,000 where nothing is said, are in 8 bits: give the length
      of the learning rate's warm-up, or under :func:`dear.attach` ``"warmup"``.
    - ``"fast"``: Power-SGD with factors in 8 bits, which have an eighth of a matrix's elements: 15 times fewer bytes
      than 16 bits. The first ``start_step`` steps, 1,000 where nothing is said, send more: 20 are dense, and in the
      others factors have half of the elements. With ``"warmup"`` all are dense. For the slowest links.

    Args:
        name: one of these.
        options: of the compressor, such as ``exempt=`` or ``start_step=``; they count in place of the preset's.

    Raises:
        ValueError: no preset has that name.
        TypeError: its compressor has no such option.
    """
    if not isinstance(name, str) or name not in PRESETS:
        names = ", ".join(f'"{one}"' for one in PRESETS)
        raise ValueError(f"preset must be one of {names}, not {name!r}.")
    kind, make = PRESETS[name]
    unknown = [option for option in options if option not in options_of(kind)]
    if unknown:
        raise TypeError(f'preset("{name}") has no option {unknown[0]}: it takes {", ".join(options_of(kind))}.')
    return make(**options)
