"""Saved states of compressors: are they what they should be, and what do they mean at another world size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compress.feedback import Feedback

if TYPE_CHECKING:
    from compress.compressor import Compressor


def check_loaded(
    compressor: Compressor, state: dict[str, Any] | Sequence[dict[str, Any]], rank: int, world: int
) -> list[dict[str, Any]]:
    """The states by old rank, all of them or this rank's own alone.

    Raises:
        ValueError: one sentence that says why this cannot be loaded.
    """
    states = state.get("ranks", [state]) if isinstance(state, dict) else list(state)
    kind = type(compressor).__name__
    if not states or not all(isinstance(one, dict) and "compressor" in one for one in states):
        raise ValueError("This is not a compressor's state: pass what its state_dict() returned.")
    options = compressor.options() | {"error_feedback": compressor.error_feedback}
    for one in states:
        if one["compressor"] != kind:
            raise ValueError(f"This is the state of {one['compressor']}, not of {kind}: load it into the same kind.")
        if one["options"] != options:
            raise ValueError(f"This state was saved with the options {one['options']}, not {options}: use the same.")
    old = states[0]["world_size"]
    if len(states) == 1 and old != 1:
        if old != world:
            raise ValueError(
                f"This is one rank's state of {old} and there are {world} ranks now: load all ranks' states, as "
                "state_dict(gather=True) returns them."
            )
        if states[0]["rank"] != rank:
            raise ValueError(f"This is the state of rank {states[0]['rank']} and this is rank {rank}: load its own.")
    elif [one["rank"] for one in states] != list(range(old)):
        raise ValueError(f"These are not the states of all {old} ranks in order: pass every rank's, rank 0 first.")
    return states


def check_parameters(compressor: Compressor, sizes: dict[str, int]) -> None:
    """Refuses a loaded state that is not of the model whose parameters (name: elements) are about to be used.

    Raises:
        ValueError: one sentence names a parameter that does not fit.
    """
    for name, numel in sizes.items():
        error = compressor.feedback.errors.get(name)
        if error is not None and error.numel() != numel:
            raise ValueError(
                f"The state loaded is of another model: {name} had {error.numel()} elements and now has {numel}; "
                "load a state saved with this model."
            )
    known = compressor.loaded_names()
    missing = [name for name in sizes if name not in known]
    if known and missing:
        raise ValueError(
            f"The state loaded is of another model: it has no parameter {missing[0]}; load a state saved with this "
            "model."
        )


def merge_states(states: list[dict[str, Any]], rank: int, world: int) -> tuple[dict[str, Any], Feedback]:
    """What this rank goes on with: a state, and its error feedback. See :meth:`Compressor.load_state_dict`."""
    feedback = Feedback()
    old = states[0]["world_size"]
    feedback.world = world
    if old == world:
        mine = states[0] if len(states) == 1 else states[rank]
        feedback.load(mine)
        return mine, feedback
    for index in range(rank, old, world):
        feedback.absorb(states[index], old)
    return states[0], feedback
