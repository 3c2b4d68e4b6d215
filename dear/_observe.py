"""The order in which the forward pass reads parameters: seen once, in a real pass.

It decides in which order fusion groups are gathered, and nothing else: whoever reads a parameter waits for it, see
Note [Pending parameters].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dear._pending import Barrier


class ForwardOrder:
    """Notes the first use of each parameter: until then it is a pending one, whose finishing is the note."""

    def __init__(self, params: Sequence[torch.nn.Parameter]) -> None:
        self.seen: list[torch.nn.Parameter] = []
        self.watching = True
        self._params = params
        self._barrier = Barrier()
        self._barrier.arrive, self._barrier.finish = lambda index: None, self._note
        self._barrier.set_groups([param] for param in params)
        self._barrier.close(range(len(params)))

    def _note(self, index: int) -> None:
        self.seen.append(self._params[index])

    def close(self) -> None:
        """Stops watching; may be called more than once."""
        self.watching = False
        self._barrier.give_up()
