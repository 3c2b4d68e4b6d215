"""What stands in ``optimizer.state`` while the state itself is elsewhere, or is not finished.

Both are dicts like torch's, and whatever is done with them goes through the methods here: reading, writing, copying,
pickling.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dear import _C

_METHODS = (
    "__getitem__", "__setitem__", "__delitem__", "__contains__", "__iter__", "__len__", "__eq__", "__ne__", "__or__",
    "__ior__", "__ror__", "__reversed__", "__repr__", "get", "items", "keys", "values", "pop", "popitem", "setdefault",
    "update", "clear",
)  # fmt: skip


class PendingState(defaultdict):  # type: ignore[type-arg]
    """A state that calls ``settle`` before anything is read or written."""

    _settle: Callable[[], None] | None = None  # another one that the user makes of this class settles nothing
    _unsettled: int | None = None  # the thread that works on it

    @classmethod
    def of(cls, content: dict[Any, Any], settle: Callable[[], None]) -> PendingState:
        """A view of ``content``, whose inner dicts it shares."""
        view = cls(dict, content)
        view._settle = settle
        return view

    @contextlib.contextmanager
    def unsettled(self) -> Iterator[None]:
        """Inside, the state as it is: for the update itself."""
        before, self._unsettled = self._unsettled, threading.get_ident()
        try:
            yield
        finally:
            self._unsettled = before

    def settle(self) -> None:
        """Finishes the update under way."""
        if self._settle is not None and self._unsettled != threading.get_ident():
            self._settle()

    def is_held_elsewhere(self) -> bool:
        """Whether anybody holds a part of it, and so could read or write it without asking here."""
        tensors = []
        for inner in dict.values(self):
            if sys.getrefcount(inner) > 3:  # this dict's, the loop's and the call's
                return True
            for value in inner.values():
                if isinstance(value, torch.Tensor):
                    if sys.getrefcount(value) > 3:
                        return True
                    tensors.append(value)
        return _C.has_aliases(tensors)


class ShardedState(defaultdict):  # type: ignore[type-arg]
    """Nothing: each rank holds its part elsewhere. Reading it would show another state than plain DDP's."""

    def __init__(self, clear: Callable[[], None]) -> None:
        super().__init__(dict)
        self._clear = clear

    def clear(self) -> None:
        """Forgets every rank's part, as clearing plain DDP's state would."""
        self._clear()


def _settling(name: str) -> Any:
    original = getattr(defaultdict, name)

    def method(self: PendingState, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return original(self, *args, **kwargs)

    return method


def _converting(name: str) -> Any:
    """Copies and pickles are of torch's own kind."""

    def method(self: PendingState, *args: Any) -> Any:
        self.settle()
        plain = defaultdict(dict, dict.items(self))
        return copy.deepcopy(plain, *args) if name == "__deepcopy__" else getattr(plain, name)(*args)

    return method


def _refusing(name: str) -> Any:
    def refuse(self: ShardedState, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "The optimizer's state is held in shards, one on each rank, so optimizer.state cannot be read, changed or "
            "copied: call engine.state_dict() on every rank, attach by dear.integrations where a framework reads it, "
            'or use dear.attach(..., update="replicated").'
        )

    return refuse


_COPYING = ("copy", "__copy__", "__deepcopy__", "__reduce_ex__")

for _name in _METHODS:
    setattr(PendingState, _name, _settling(_name))
    if _name not in ("__repr__", "clear"):
        setattr(ShardedState, _name, _refusing(_name))
for _name in _COPYING:
    setattr(PendingState, _name, _converting(_name))
    setattr(ShardedState, _name, _refusing(_name))
