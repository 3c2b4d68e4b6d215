"""What was found out about an engine's setting while training went on: part of its state, so that a run that is resumed
does not search again.

Only results are saved. Times of a search that is under way may be of another machine or network than those on which it
goes on, so a run that is resumed in mid-search begins the search again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["AUTO", "TUNER", "Finder", "Findings"]

AUTO, TUNER = "auto", "tuner"  #: keys of an engine's state

State = dict[str, Any]


class Finder(Protocol):
    """What looks for a setting while training goes on. Every rank has one alike."""

    def state_dict(self) -> State | None:
        """What it has found, the same on every rank; None as long as it searches."""

    def load_state_dict(self, state: State) -> bool:
        """Goes on with what was found, if that counts here, and then searches no more; says whether it does.
        Collective."""


class Findings:
    """An engine's finders by the key of their state."""

    def __init__(self) -> None:
        self._finders: dict[str, Finder] = {}
        self._waiting: dict[str, State] = {}  # loaded before there was a tuner

    def add(self, key: str, finder: Finder) -> None:
        """One that begins now, which takes what was loaded for it. Collective."""
        self._finders[key] = finder
        if key in self._waiting:
            finder.load_state_dict(self._waiting.pop(key))

    def tries(self) -> bool:
        """Whether auto is there and has chosen nothing yet: a compressor at work is on trial."""
        return AUTO in self._finders and self._finders[AUTO].state_dict() is None

    def state(self) -> State:
        """What was found, by key."""
        found = {key: finder.state_dict() for key, finder in self._finders.items()}
        return self._waiting | {key: state for key, state in found.items() if state is not None}

    def load(self, state: Mapping[str, Any]) -> bool:
        """Hands everyone what is theirs of an engine's state; says whether the compressor at work is that of the state,
        as far as auto chooses it. Collective."""
        followed = {key: finder.load_state_dict(state[key]) for key, finder in self._finders.items() if key in state}
        # A tuner is made after attach, and maybe after this; auto is there from the beginning.
        self._waiting = {TUNER: state[TUNER]} if TUNER in state and TUNER not in self._finders else {}
        return AUTO not in self._finders or followed.get(AUTO, False)
