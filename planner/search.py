"""The size of fusion groups by Bayesian optimisation, on measured steps.

Source: DeAR tunes its fusion so (Zhang et al., 2023, section IV): 1 to 100 MiB, expected improvement with ξ = 0.1. Here
sizes count by their logarithm, and times as multiples of the first one.

Note [Threads that wait]
A BLAS with several threads has them wait for more work at full load: OpenBLAS for about 100 ms. Matrices here have
fewer than ten rows, but they woke one thread for each core, and the steps behind it took 1.7 times as long where steps
are short. So the search computes on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from bayes_opt import BayesianOptimization
from bayes_opt.acquisition import ExpectedImprovement
from threadpoolctl import threadpool_limits

LARGEST = 100.0  # MiB
XI = 0.1
NOISE = 0.05  # of the times' variance: trials are short
NEAR = 1.1  # sizes that differ by less are one
# Times as long as what was tried, predicted: more than most predictions are off (benchmarks/predicted), and they err
# less about one size beside another.
WORSE = 1.15


class Quick(ExpectedImprovement):
    """Looks at fewer points: there is one dimension."""

    def suggest(self, *given: Any, **options: Any) -> Any:
        return super().suggest(*given, **options | {"n_random": 500, "n_smart": 1})


class Search:
    """Asks for sizes in MiB, is told seconds. Only rank 0 has one: what it asks for depends on libraries.

    Groups are made of whole gradients, so many sizes make the same groups, most of all of a small model. Each size that
    is asked for makes others than all that were tried, and none is predicted to take much longer than those.
    """

    def __init__(
        self,
        model_mib: float,
        tried: Sequence[tuple[float, float]],
        layout: Callable[[float], Hashable],
        foreseen: Callable[[float], float],
    ) -> None:
        """model_mib: of all gradients. tried: sizes and seconds that were measured before, the fastest first. layout:
        which groups a size makes. foreseen: seconds that are predicted of one."""
        self.high = min(LARGEST, model_mib)
        self.low = min(1.0, self.high / 16)
        size, self._first = tried[0]
        self._hints = [size / 4, size * 4]  # which say where it falls
        self._layout, self._foreseen = layout, foreseen
        self._bearable = WORSE * min(foreseen(size) for size, _ in tried)
        self._seen: list[float] = []
        self._made: set[Hashable] = set()  # the layouts of these
        bounds: Any = {"size": (math.log2(self.low), math.log2(self.high))}
        self._search = BayesianOptimization(
            None, bounds, acquisition_function=Quick(xi=XI), random_state=0, verbose=0,
            allow_duplicate_points=True,
        )  # fmt: skip
        self._search.set_gp_params(alpha=NOISE, n_restarts_optimizer=1)
        for one in tried:
            self.tell(*one)

    def ask(self) -> float | None:
        """The size to try next; None where no other one is left."""
        while self._hints:
            size = self._hints.pop(0)
            if self.low <= size <= self.high and self._is_new(size) and self._may_win(size):
                return size
        left = [size for size in self._grid() if self._is_new(size)]
        if not left:
            return None
        with threadpool_limits(1, user_api="blas"):  # see Note [Threads that wait]
            wanted = float(self._search.suggest()["size"])
        return next(filter(self._may_win, sorted(left, key=lambda size: abs(math.log2(size) - wanted))), None)

    def tell(self, size: float, seconds: float) -> None:
        size = min(max(size, self.low), self.high)  # what is larger than the model is one group
        self._seen.append(size)
        self._made.add(self._layout(size))
        self._search.register(params={"size": math.log2(size)}, target=-seconds / self._first)

    def _is_new(self, size: float) -> bool:
        far = all(max(size / seen, seen / size) >= NEAR for seen in self._seen)
        return far and self._layout(size) not in self._made

    def _may_win(self, size: float) -> bool:
        return self._foreseen(size) <= self._bearable

    def _grid(self) -> list[float]:
        """Sizes of which each is about NEAR times the one before, from the lowest to the highest."""
        count = max(1, round(math.log(self.high / self.low, NEAR)))
        return [self.low * (self.high / self.low) ** (step / count) for step in range(count + 1)]
