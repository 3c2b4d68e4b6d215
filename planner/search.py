"""The size of fusion groups by Bayesian optimisation, on measured steps.

Source: DeAR tunes its fusion so (Zhang et al., 2023, section IV): 1 to 100 MiB, expected improvement with ξ = 0.1. Here
sizes count by their logarithm, and times in per cent of the first one, so that ξ is a tenth of a per cent.
"""

from __future__ import annotations

import math
from typing import Any

LARGEST = 100.0  # MiB
XI = 0.1


class Search:
    """Asks for sizes in MiB, is told seconds. Only rank 0 has one: what it asks for depends on the library's version."""

    def __init__(self, model_mib: float, size: float, seconds: float) -> None:
        """model_mib: of all gradients. size, seconds: what was measured before."""
        from bayes_opt import BayesianOptimization
        from bayes_opt.acquisition import ExpectedImprovement

        self.high = max(min(LARGEST, model_mib), size)
        self.low = min(1.0, self.high / 16, size)
        self._first = seconds
        self._seen: list[tuple[float, float]] = []
        bounds: Any = {"size": (math.log2(self.low), math.log2(self.high))}
        self._search = BayesianOptimization(
            None, bounds, acquisition_function=ExpectedImprovement(xi=XI), random_state=0, verbose=0,
            allow_duplicate_points=True,
        )  # fmt: skip
        self.tell(size, seconds)

    def ask(self) -> float:
        """The size to try next: first a quarter and four times the one that was known, which say where it falls."""
        known, _ = self._seen[0]
        for size in (known / 4, known * 4):
            if self.low <= size <= self.high and all(
                not math.isclose(size, seen, rel_tol=0.01) for seen, _ in self._seen
            ):
                return size
        return float(2.0 ** self._search.suggest()["size"])

    def tell(self, size: float, seconds: float) -> None:
        self._seen.append((size, seconds))
        self._search.register(params={"size": math.log2(size)}, target=-100.0 * seconds / self._first)

    @property
    def best(self) -> tuple[float, float]:
        """The size with the fastest step, and its seconds."""
        return min(self._seen, key=lambda one: one[1])
