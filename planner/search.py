"""The size of fusion groups by Bayesian optimisation, on measured steps.

Source: DeAR tunes its fusion so (Zhang et al., 2023, section IV): 1 to 100 MiB, expected improvement with ξ = 0.1. Here
sizes count by their logarithm, and times as multiples of the first one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from bayes_opt import BayesianOptimization
from bayes_opt.acquisition import ExpectedImprovement

LARGEST = 100.0  # MiB
XI = 0.1
NOISE = 0.05  # of the times' variance: trials are short
NEAR = 1.1  # sizes that differ by less are one: groups are made of whole buckets


class Quick(ExpectedImprovement):
    """Looks at fewer points: there is one dimension."""

    def suggest(self, *given: Any, **options: Any) -> Any:
        return super().suggest(*given, **options | {"n_random": 500, "n_smart": 1})


class Search:
    """Asks for sizes in MiB, is told seconds. Only rank 0 has one: what it asks for depends on libraries."""

    def __init__(self, model_mib: float, size: float, seconds: float, hints: Sequence[float] = ()) -> None:
        """model_mib: of all gradients. size, seconds: what was measured before. hints: sizes to try first."""
        self.high = min(LARGEST, model_mib)
        self.low = min(1.0, self.high / 16)
        size = min(max(size, self.low), self.high)
        self._first = seconds
        self._hints = [*hints, size / 4, size * 4]  # which say where it falls
        self._seen: list[float] = []
        bounds: Any = {"size": (math.log2(self.low), math.log2(self.high))}
        self._search = BayesianOptimization(
            None, bounds, acquisition_function=Quick(xi=XI), random_state=0, verbose=0,
            allow_duplicate_points=True,
        )  # fmt: skip
        self._search.set_gp_params(alpha=NOISE, n_restarts_optimizer=1)
        self.tell(size, seconds)

    def ask(self) -> float:
        """The size to try next."""
        while self._hints:
            size = self._hints.pop(0)
            if self.low <= size <= self.high and self._is_new(size):
                return size
        size = float(2.0 ** self._search.suggest()["size"])
        return size if self._is_new(size) else self._between()

    def tell(self, size: float, seconds: float) -> None:
        size = min(max(size, self.low), self.high)  # what is larger than the model is one group
        self._seen.append(size)
        self._search.register(params={"size": math.log2(size)}, target=-seconds / self._first)

    def _is_new(self, size: float) -> bool:
        return all(max(size / seen, seen / size) >= NEAR for seen in self._seen)

    def _between(self) -> float:
        """The middle of the widest gap between sizes that were tried."""
        known = sorted({self.low, self.high, *self._seen})
        below, above = max(pairwise(known), key=lambda gap: gap[1] / gap[0])
        return math.sqrt(below * above)
