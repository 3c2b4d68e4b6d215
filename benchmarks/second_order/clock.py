"""What a step's second-order work takes, by part."""

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from torch.optim import _muon, adam, sgd

# What a binding has, and which part of a step each method of it is. Inner ones are taken off the outer ones.
METHODS = {
    "factors": ("_capture._sink", "_capture._reduce", "_method.for_owners"),
    "inversion": ("_method.solver.solve",),
    "communication": (
        "_exchanges.total", "_exchanges.average", "_exchanges.wait",
        "_ranks.mean_at_owners", "_ranks.complete", "_ranks.sum",
    ),
    "preconditioning": ("backward_ended", "begin", "precondition", "end"),
}  # fmt: skip
#: Where torch's optimizers do their work, whoever calls them.
UPDATES = ((sgd, "sgd"), (adam, "adam"), (_muon, "muon"))
PARTS = (*METHODS, "update")
#: Waiting takes no CPU time: the others are counted in CPU time, which a busy machine does not change much.
WAITS = ("communication",)


class Clock:
    """Milliseconds of the training thread that parts of a step take, as a context: CPU time, and of WAITS wall time."""

    def __init__(self) -> None:
        self._cpu: dict[str, float] = defaultdict(float)
        self._wall: dict[str, float] = defaultdict(float)
        self._inside: list[tuple[float, float]] = []  # of the calls inside each call under way
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "Clock":
        for module, name in UPDATES:
            self._exchange("update", module, name)
        return self

    def __exit__(self, *_: Any) -> None:
        for undo in reversed(self._undo):
            undo()

    def watch(self, binding: Any) -> None:
        """Times what the binding has of METHODS, until the end."""
        for part, names in METHODS.items():
            for name in names:
                *path, last = name.split(".")
                owner = binding
                for step in path:
                    owner = getattr(owner, step, None)
                if getattr(owner, last, None) is not None:
                    self._exchange(part, owner, last)

    def ms(self, steps: int) -> dict[str, float]:
        """A step, by part."""
        return {part: round((self._wall if part in WAITS else self._cpu)[part] * 1e3 / steps, 4) for part in PARTS}

    def _exchange(self, part: str, owner: Any, name: str) -> None:
        found = getattr(owner, name)
        own = name in vars(owner)  # not its class's
        self._undo.append(partial(setattr, owner, name, found) if own else partial(delattr, owner, name))
        setattr(owner, name, self._timed(part, found))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            cpu, wall = time.thread_time(), time.perf_counter()
            self._inside.append((0.0, 0.0))
            try:
                return function(*args, **options)
            finally:
                took = time.thread_time() - cpu, time.perf_counter() - wall
                inner = self._inside.pop()
                self._cpu[part] += took[0] - inner[0]
                self._wall[part] += took[1] - inner[1]
                if self._inside:
                    self._inside[-1] = self._inside[-1][0] + took[0], self._inside[-1][1] + took[1]

        return timed
