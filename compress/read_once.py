"""What of a compressor may be assigned: an option with a setter, and nothing that would change nothing, half of it, or
break a later step."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any

_PACKAGE = __name__.partition(".")[0]
#: Options of which a compressor makes something else at once, or which it checks then.
_AS_IT_IS_MADE = ("start_step", "exempt", "rank_of", "factor_dtype", "dtype", "scale", "start_dtype")

#: For whoever drives a compressor without a binding, and so counts its steps.
_FOR_DRIVERS = ("initial_step",)


class ReadOnce:
    """Refuses assignments from outside this package: of options that count as a compressor begins to work, of names
    that mean something else, and, to this package's own classes, of names that mean nothing."""

    binding: Any  # what feeds the compressor, once it is at work

    def __setattr__(self, name: str, value: Any) -> None:
        if _by_package():
            if not name.startswith("_") and name not in _FOR_DRIVERS:
                self.__dict__.setdefault("_internals", set()).add(name)
        elif not name.startswith("_"):
            self._check_assigned(name, value)
        super().__setattr__(name, value)

    def _check_assigned(self, name: str, value: Any) -> None:
        """Raises:
        AttributeError: one sentence says what is wrong with assigning that, and what to do.
        """
        kind: Any = type(self)
        static = inspect.getattr_static(kind, name, None)
        if isinstance(static, property) and static.fset is not None:
            return  # which takes care of itself
        if isinstance(static, property) or (callable(static) and not callable(value)):
            what = "computed" if isinstance(static, property) else "a method"
            raise AttributeError(
                f"{name} of {kind.__name__} is {what}, which cannot be assigned: {_remedy(kind, name)}."
            )
        if name in options_of(kind, _PACKAGE):
            if name in _AS_IT_IS_MADE and name in self.__dict__ and "start" in self.__dict__:
                raise AttributeError(
                    f"{name} is read as a compressor is made, so it cannot be assigned afterwards: make another "
                    f"compressor with {name}=."
                )
            if self.__dict__.get("binding") is not None and name not in ("seed", "process_group"):  # as others say
                raise AttributeError(
                    f"{name} is read as a compressor begins to work, so it cannot be assigned later: make another "
                    f"compressor with {name}=, and attach with that one."
                )
        elif name in self.__dict__.get("_internals", ()):
            raise AttributeError(
                f"{name} of {kind.__name__} is kept by the library, so it cannot be assigned: {_remedy(kind, name)}."
            )
        elif kind.__module__.partition(".")[0] == _PACKAGE and not hasattr(self, name):
            raise AttributeError(
                f"{kind.__name__} has no option {name}, so assigning it would change nothing: {_remedy(kind, name)}."
            )


def _by_package() -> bool:
    """Whether a function of this package assigns: a user's compressor is not told apart from who uses it."""
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__setattr__" and frame.f_back is not None:  # a subclass's, which passes it on
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).partition(".")[0] == _PACKAGE


def described(compressor: ReadOnce) -> Iterator[str]:
    """``option=value`` for what may be given by its place, and for each other option that is not as by default."""
    kind: Any = type(compressor)
    parameters: dict[str, inspect.Parameter] = {}
    for base in reversed(kind.__mro__):
        if "__init__" in vars(base) and base is not object:
            parameters |= inspect.signature(base.__init__).parameters
    for name in options_of(kind):
        parameter = parameters[name]
        value = getattr(compressor, name, parameter.default)
        if parameter.kind is not parameter.KEYWORD_ONLY or repr(value) != repr(parameter.default):
            yield f"{name}={value!r}"


@cache
def options_of(kind: Any, package: str | None = None) -> tuple[str, ...]:
    """The keywords that a class of compressors takes, the most special first; with ``package`` those of its classes."""
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base) and base is not object and package in (None, base.__module__.partition(".")[0]):
            several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            parameters = list(inspect.signature(base.__init__).parameters.items())[1:]
            names |= dict.fromkeys(name for name, parameter in parameters if parameter.kind not in several)
    return tuple(names)


def _remedy(kind: Any, name: str) -> str:
    """What to do instead of assigning that name."""
    options = options_of(kind)
    close = get_close_matches(name, options, 1)
    if not close:
        return f"its options are {', '.join(options)}"
    if isinstance(inspect.getattr_static(kind, close[0], None), property):
        return f"assign {close[0]}"
    return f"make another compressor with {close[0]}="
