"""An engine's state, beside what was found about its setting: what is saved, and in which order it is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from dear._assembly import Timetable
from dear._attached import Attached
from dear._update import Update

__all__ = ["check", "load", "save"]

State = dict[str, Any]


def save(attached: Attached, schedule: Timetable, *, compressor: bool, gather: bool) -> State:
    """All but the optimizers' states. Nothing may be in flight. Collective with a compressor or a preconditioner.

    compressor: whether to save its state.
    gather: False takes this rank's state of it alone.
    """
    state: State = {"bucket_order": schedule.bucket_order.names()}
    at_work, preconditioner = attached.compression.compressor, attached.preconditioning.preconditioner
    if compressor and at_work is not None:
        state["compressor"] = at_work.state_dict(gather=gather)
    if preconditioner is not None:
        state["preconditioner"] = preconditioner.state_dict()
    return state


def save_optimizers(attached: Attached, update: Update) -> State | list[State]:
    """In full; a list where there are several. Collective where the state is in parts."""
    with update.full_state():
        states = [user.state_of_run() for user in attached.users]
    return states[0] if len(states) == 1 else states


def check(state: State) -> None:
    """Refuses what is no engine's state, before anything is taken of it.

    Raises:
        TypeError, KeyError: one sentence.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"An engine's state is a dict, not {type(state).__name__}: pass what engine.state_dict() returned."
        )
    if "optimizer" not in state and "bucket_order" not in state:
        raise KeyError('An engine\'s state has the key "optimizer": pass what engine.state_dict() returned.')


def _owes(state: Any) -> bool:
    """Whether a compressor's state, of one rank or of all, has error feedback."""
    states = state.get("ranks", [state]) if isinstance(state, dict) else []
    return any(isinstance(one, dict) and one.get("errors") for one in states)


def load(attached: Attached, schedule: Timetable, state: State, *, compressor: bool) -> None:
    """Takes what was saved; see :meth:`dear.engine.Engine.load_state_dict`.

    compressor: whether its state is of the one that is at work.
    """
    at_work, preconditioner = attached.compression.compressor, attached.preconditioning.preconditioner
    if compressor and at_work is not None and "compressor" in state:
        at_work.load_state_dict(state["compressor"])
    elif "optimizer" in state and getattr(at_work, "error_feedback", False):
        warnings.warn(
            "The state has no error feedback of the compressor, so training goes on without what was not sent yet: "
            "save what engine.state_dict() returns.",
            stacklevel=3,
        )
    elif compressor and at_work is None and _owes(state.get("compressor")):
        warnings.warn(
            "The state has a compressor's error feedback and the engine has no compressor, so what was not sent yet is "
            "dropped: attach with the compressor that the state was saved with, to go on with it.",
            stacklevel=3,
        )
    if preconditioner is not None and "preconditioner" in state:
        preconditioner.load_state_dict(state["preconditioner"])
    if "optimizer" in state:
        users, states = attached.users, state["optimizer"]
        states = [states] if isinstance(states, dict) else list(states)
        if len(states) != len(users):
            raise ValueError(
                f"The state is of {len(states)} optimizers and the engine has {len(users)}: attach to as many, in "
                "the same order."
            )
        for user, one in zip(users, states, strict=True):
            user.optimizer.load_state_dict(one)
    schedule.bucket_order.load(list(state.get("bucket_order", [])))
