"""Options that count as a compressor begins to work: assigning them later would change nothing, or half of it."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


class ReadOnce:
    """Refuses that, by the options of the classes of this package; a property takes care of itself."""

    binding: Any  # what feeds the compressor, once it is at work

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("binding") is not None and name in _options(type(self)):  # type: ignore[arg-type]
            raise AttributeError(
                f"{name} is read as a compressor begins to work, so it cannot be assigned later: make another "
                f"compressor with {name}=, and attach with that one."
            )
        super().__setattr__(name, value)


@cache
def _options(kind: Any) -> frozenset[str]:
    own = [base for base in kind.__mro__ if base.__module__.startswith("compress.") and "__init__" in vars(base)]
    names = {
        name
        for base in own
        for name, parameter in inspect.signature(base.__init__).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    given = {"self", "seed", "process_group"}  # the last two are what the first rank, and attach, say
    return frozenset(name for name in names - given if not isinstance(getattr(kind, name, None), property))
