"""Compressors by what they may cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from compress.compressor import Compressor
from compress.dense import Dense
from compress.power_sgd import PowerSGD

PRESETS: dict[str, Callable[..., Compressor]] = {
    "exact": lambda **more: Dense(torch.bfloat16, **{"error_feedback": True, **more}),
    "safe": lambda **more: PowerSGD(**{"rank": "4.5x", **more}),
    "fast": lambda **more: PowerSGD(**{"rank": 1 / 32, **more}),
}


def preset(name: Literal["exact", "safe", "fast"], **options: Any) -> Compressor:
    """A new compressor, chosen by what was measured (the page "Compression and loss" has the losses).

    - ``"exact"``: every element in 16 bits, rounding kept in the error feedback.
    - ``"safe"``: Power-SGD that sends 4.5 times fewer elements of every matrix, in 16-bit factors: with all vectors,
      which are sent exactly, more than 4 times fewer bytes than 16 bits.
    - ``"fast"``: Power-SGD with a thirty-second: at least 16 times fewer. For the slowest links.

    Args:
        name: one of these.
        options: of the compressor, such as ``exempt=`` or ``start_step=``; they count in place of the preset's.

    Raises:
        ValueError: no preset has that name.
    """
    if name not in PRESETS:
        names = ", ".join(f'"{one}"' for one in PRESETS)
        raise ValueError(f"preset must be one of {names}, not {name!r}.")
    return PRESETS[name](**options)
