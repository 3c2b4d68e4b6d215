"""Steps of the user's own get the user's own parameters, not this library's pieces of flat buffers.

Such a step may know a parameter by more than its values: by an attribute that was put on it, by ``id()``, as a key of a
dict that was made when the optimizer was. What stands for it here would be taken for another one, without a word.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dear._layout import Segment

State = dict[Any, Any]


@contextlib.contextmanager
def lent(segments: Sequence[Segment], values: State) -> Iterator[tuple[list[torch.Tensor], State]]:
    """Inside, an update is made of the tensors that this gives, and their state: for each segment the parameter itself,
    with the segment's gradient in its ``.grad``, where the segment is a whole one.

    values: the state by segment. What the update leaves in values, state and gradients is the segments' afterwards.
    """
    loans = [_Loan(segment) for segment in segments]
    state: State = defaultdict(dict)
    state.update({loan.tensor: values[loan.own] for loan in loans if loan.own in values})
    try:
        yield [loan.tensor for loan in loans], state
    finally:
        for loan in loans:
            loan.give_back()
            values.pop(loan.own, None)
            if loan.tensor in state:
                values[loan.own] = state[loan.tensor]


class _Loan:
    """One segment, and what a step gets for it."""

    def __init__(self, segment: Segment) -> None:
        self.own: torch.Tensor = segment.tensor
        self.tensor: torch.Tensor = segment.places[0].param if segment.whole else segment.tensor
        self._home = self.tensor.data
        if segment.whole:
            self._shown = _exchange_grad(self.tensor, self.own.grad)

    def give_back(self) -> None:
        """Takes what the step has made of it."""
        if self.tensor.data_ptr() != self.own.data_ptr():  # it never stood in the flat buffer, or was put elsewhere
            self.own.data.copy_(self.tensor.data)
            self.tensor.data = self._home
        if self.tensor is not self.own:
            grad = _exchange_grad(self.tensor, self._shown)
            if grad is not self.own.grad:
                self.own.grad = grad


def _exchange_grad(param: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor | None:
    """Puts a gradient into ``.grad``, and gives what was there."""
    with torch._C.DisableTorchFunctionSubclass():
        before, param.grad = param.grad, grad
    return before
