"""Choices by parameter: which ones are meant by a name, a pattern or a predicate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from dear._names import plain

Predicate = Callable[[str, Tensor], bool]
Selection = str | Iterable[str] | Predicate


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a parameter: its name, its module's name, or a glob pattern such as ``"*.bias"``."""
    return name == pattern or name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def check_matched(patterns: Mapping[str, Iterable[str]], names: Iterable[str]) -> None:
    """Refuses a pattern, of those by option, that means none of the model's parameters.

    Raises:
        ValueError: one sentence says which.
    """
    known = list(names)
    for option, given in patterns.items():
        for pattern in given:
            if not any(matches(pattern, name) for name in known):
                raise ValueError(
                    f"{option} names {pattern!r}, which matches no parameter of the model: give names as "
                    "model.module.named_parameters() has them, or a pattern such as '*.bias'."
                )


def vectors(name: str, param: Tensor) -> bool:
    """Selects what has one dimension or none: biases, and weights of norms."""
    return param.dim() < 2


def check_called(function: Callable[..., Any], option: str) -> None:
    """Refuses a callable that cannot be called with a name and a parameter.

    Raises:
        TypeError: one sentence names the option.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # of some that are written in C nobody knows it
        return
    try:
        signature.bind("", None)
    except TypeError:
        raise TypeError(
            f"{option} is called with the name of a parameter and the parameter, and {function!r} does not take two "
            "arguments: write it as lambda name, param: ..."
        ) from None


def _called(function: Callable[..., Any]) -> str:
    """A function as a reader knows it, without its address."""
    return str(getattr(function, "__name__", type(function).__name__))


class Selected:
    """Parameters selected by name: what ``exempt=`` takes."""

    def __init__(self, given: Selection, option: str) -> None:
        self._predicate: Predicate | None = None
        self.patterns: tuple[str, ...] = ()
        if callable(given):
            check_called(given, option)
            self._predicate = given
            return
        patterns = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
        if not all(isinstance(pattern, str) and pattern for pattern in patterns):
            raise ValueError(
                f"{option} must be names of parameters or a callable of name and parameter, not {given!r}."
            )
        self.patterns = tuple(map(plain, patterns))

    def __repr__(self) -> str:
        return _called(self._predicate) if self._predicate is not None else repr(self.patterns)

    def __call__(self, name: str, param: Tensor) -> bool:
        if self._predicate is not None:
            return bool(self._predicate(name, param))
        return any(matches(pattern, name) for pattern in self.patterns)


class Assigned:
    """A value by parameter: what ``rank_of=`` takes. None where nothing is said; of several patterns the first
    counts."""

    def __init__(
        self, given: Mapping[str, Any] | Callable[[str, Tensor], Any] | None, option: str, check: Callable[[Any], Any]
    ) -> None:
        if not (given is None or callable(given) or isinstance(given, Mapping)):
            raise ValueError(f"{option} must map names of parameters to values, or be a callable, not {given!r}.")
        self._function = given if callable(given) else None
        if self._function is not None:
            check_called(self._function, option)
        self._check = check
        self.by_pattern: dict[str, Any] = {}
        if isinstance(given, Mapping):
            self.by_pattern = {plain(str(name)): self._checked(str(name), value) for name, value in given.items()}

    def __repr__(self) -> str:
        return _called(self._function) if self._function is not None else repr(self.by_pattern or None)

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(self.by_pattern)

    def __call__(self, name: str, param: Tensor) -> Any:
        if self._function is not None:
            value = self._function(name, param)
            return None if value is None else self._checked(name, value)
        return next((value for pattern, value in self.by_pattern.items() if matches(pattern, name)), None)

    def _checked(self, name: str, value: Any) -> Any:
        try:
            return self._check(value)
        except ValueError as error:
            raise ValueError(f"For {name!r}, {error}") from None
