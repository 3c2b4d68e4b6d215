"""A chooser that changes the setting at every step boundary, as ``compressor="auto"`` does while it measures."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from torch.nn.parallel import DistributedDataParallel as DDP

from dear._assembly import Setting
from dear.compression import Compressor

CAPS = (0.002, 0.004, 1.0)  # MiB: several fusion groups, or one


class Switching:
    """Draws from all settings that serve the optimizers; the same on every rank.

    compressor: makes one that stays dense.
    """

    plan = None

    def __init__(self, compressor: Callable[[], Compressor], seed: int = 0) -> None:
        self._compressor, self._rng = compressor, random.Random(seed)

    def check_new(self, model: DDP, caller: str) -> dict[str, Any]:
        return {}

    def first(self, steering: Any) -> Setting | None:
        return self._drawn(steering)

    def begin(self, steering: Any) -> None:
        self._steering = steering

    def step_began(self) -> None:
        if (setting := self._drawn(self._steering)) is not None:
            self._steering.switch(setting)

    def _drawn(self, steering: Any) -> Setting | None:
        compresses = self._rng.random() < 0.25
        served = steering.updates(compresses)
        if not served:  # as a compressor with several optimizers
            return None
        return Setting(self._rng.choice(served), self._rng.choice(CAPS), self._compressor() if compresses else None)

    def state_dict(self) -> None:
        return None

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        return False

    def release(self) -> None: ...
