"""Saved states of compressors: what is saved, what may be loaded, and what it means at another world size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from compress.contract import Contract
from compress.feedback import Feedback
from compress.group import settle_errors
from dear._agree import everyones

State = dict[str, Any]


def save(compressor: Contract, gather: bool) -> State:
    """See :meth:`compress.Compressor.state_dict`."""
    ranks = compressor.ranks()
    if compressor.binding is not None:
        compressor.binding.synchronize()
    settle_errors(compressor.groups.values())
    if compressor.groups or compressor.loaded is None:
        layout = [list(group.names) for group in compressor.groups.values()]
    else:
        layout = compressor.loaded["layout"]
    state = {
        "compressor": type(compressor).__name__,
        "options": options_of(compressor),
        "made_with": made_with(compressor),
        "step": compressor.step,
        "start": compressor.start.state(),
        "seed": compressor.seed,
        "rank": ranks.rank(),
        "world_size": ranks.size(),
        "nodes": nodes_of(compressor),
        "layout": layout,
        "exempt": sorted(compressor.exempted),
        **compressor.feedback.state(),
        "named": compressor.named_state(),
        "own": compressor.own_state(),
    }
    if not gather:
        return state
    # A tensor comes to the device that it was on: all ranks' to all of their GPUs.
    state = tree_map_only(Tensor, Tensor.cpu, state)
    if compressor.binding is not None:
        return {"ranks": compressor.binding.everyones(state)}
    return {"ranks": everyones(ranks, state, "the compressor's state")}


def load(compressor: Contract, state: State | Sequence[State]) -> None:
    """See :meth:`compress.Compressor.load_state_dict`."""
    ranks = compressor.ranks()
    if compressor.binding is not None:
        compressor.binding.synchronize()
    states = check_loaded(compressor, state, ranks.rank(), ranks.size())
    if compressor.binding is not None:
        compressor.binding.finish_step(raises=False)  # the state may be why it is loaded
    mine, feedback = merge_states(states, ranks.rank(), ranks.size())
    before, assigned = options_of(compressor), compressor.assigned
    take_assigned(compressor, states[0]["options"])
    try:
        compressor.load_named_state(mine["named"])  # which may refuse it
        if mine["world_size"] == ranks.size():
            compressor.load_own_state(mine["own"])  # the same
        else:
            compressor.forget_own_state()
    except ValueError:
        take_assigned(compressor, before)
        compressor.assigned = assigned
        raise
    made = states[0].get("made_with", {})
    options = options_of(compressor).items()
    compressor.assigned = {name: made[name] for name, value in options if made.get(name, value) != value}
    compressor.feedback = feedback
    compressor.seed = mine["seed"]
    compressor.start.load(mine["start"])
    compressor.initial_step = mine["step"]
    if compressor.binding is not None:
        compressor.binding.forget_groups(mine["step"])
    compressor.groups.clear()
    compressor.loaded = mine


def change(compressor: Any, option: str, apply: Callable[[], None]) -> None:
    """Changes an option by ``apply`` between two steps: what the compressor has learned and owes goes on."""
    if not hasattr(compressor, "stages"):  # it is being made
        apply()
        return
    compressor.assigned = {option: compressor.stages.said} | compressor.assigned
    if compressor.binding is None and not compressor.groups and compressor.loaded is None:  # nothing yet
        apply()
        return
    if compressor.binding is not None:
        compressor.binding.synchronize()
        compressor.binding.finish_step()
    state = save(compressor, gather=False)
    apply()
    state["options"] = options_of(compressor)
    load(compressor, state)


def options_of(compressor: Contract) -> dict[str, Any]:
    """What must be as it was where a state is loaded."""
    return compressor.options() | {"error_feedback": compressor.error_feedback}


def made_with(compressor: Contract) -> dict[str, Any]:
    """The options before any of them was assigned."""
    return options_of(compressor) | compressor.assigned


def take_assigned(compressor: Contract, options: dict[str, Any]) -> None:
    """Makes the options these, which differ by what can be assigned."""
    mine = options_of(compressor)
    for name, value in options.items():
        if value != mine[name]:
            setattr(compressor, name, value)


def nodes_of(compressor: Contract) -> list[list[int]] | None:
    """The ranks by node, where the compressor works between nodes alone."""
    return None if compressor.levels is None else [list(node) for node in compressor.levels.nodes.ranks]


def check_nodes(compressor: Contract, state: State | None) -> None:
    """Refuses a state whose error feedback is of other nodes' means, or of ranks where it is to be of nodes.

    Raises:
        ValueError: one sentence says which nodes it was saved with.
    """
    if state is None or state.get("nodes") == nodes_of(compressor):
        return
    before, now = (
        "one level" if nodes is None else f"two levels of the nodes {nodes}"
        for nodes in (state.get("nodes"), nodes_of(compressor))
    )
    raise ValueError(
        f"The compressor's state was saved in {before}, and training runs in {now}: start as many ranks with the "
        'hierarchy of then, or leave "compressor" out of an engine\'s state to start anew.'
    )


def loaded_names(compressor: Contract) -> set[str]:
    """The parameters of the state that was loaded, as long as it counts."""
    return {name for part in compressor.loaded["layout"] for name in part} if compressor.loaded else set()


def check_loaded(compressor: Contract, state: State | Sequence[State], rank: int, world: int) -> list[State]:
    """The states by old rank, all of them or this rank's own alone.

    Raises:
        ValueError: one sentence that says why this cannot be loaded.
    """
    states = state.get("ranks", [state]) if isinstance(state, dict) else list(state)
    kind = type(compressor).__name__
    if not states or not all(isinstance(one, dict) and "compressor" in one for one in states):
        raise ValueError("This is not a compressor's state: pass what its state_dict() returned.")
    options = options_of(compressor)
    made = made_with(compressor)
    for one in states:
        check_form(one)
        if one["compressor"] != kind:
            raise ValueError(
                f"This is the state of {one['compressor']}, not of {kind}: load it into the same kind, or leave "
                '"compressor" out of an engine\'s state to start anew.'
            )
        if one["options"] != states[0]["options"]:
            raise ValueError(
                f"The ranks of this state were saved with other options ({states[0]['options']} and {one['options']}): "
                "assign them on every rank alike before saving."
            )
        if one["options"] != options and one.get("made_with", one["options"]) != made:
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
    if compressor.binding is not None:  # else the first bucket shows
        check_nodes(compressor, states[0])
    return states


def check_form(state: State) -> None:
    """Refuses a state that was damaged or put together by hand, before anything is taken of it.

    Raises:
        ValueError: one sentence that names the first part that is wrong.
    """
    kinds = {
        "options": dict, "step": int, "start": dict, "seed": int, "rank": int, "world_size": int, "layout": list,
        "exempt": list, "errors": dict, "owned": dict, "named": dict, "begun": list,
        "made_with": dict,
    }  # fmt: skip
    for part, kind in kinds.items():
        if part in ("begun", "made_with") and part not in state:  # of before there were any
            continue
        if not isinstance(state.get(part), kind):
            found = f"a {type(state[part]).__name__}" if part in state else "missing"
            raise ValueError(
                f'The compressor\'s state is damaged: "{part}" must be a {kind.__name__} and is {found}; load what '
                "state_dict() returned."
            )
    if "own" not in state:  # of whatever type
        raise ValueError('The compressor\'s state is damaged: "own" is missing; load what state_dict() returned.')
    owned = {name: value[-1] if isinstance(value, tuple) else value for name, value in state["owned"].items()}
    for name, error in [*state["errors"].items(), *owned.items()]:
        if not isinstance(error, Tensor) or error.dtype != torch.float32 or error.dim() != 1:
            raise ValueError(
                f"The compressor's state is damaged: the error feedback of {name} must be a flat float32 tensor; load "
                "what state_dict() returned."
            )


def check_parameters(compressor: Contract, sizes: dict[str, int]) -> None:
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
    known = loaded_names(compressor)
    exempt = set(compressor.loaded["exempt"]) if compressor.loaded else set()
    for name in known.intersection(sizes):
        if (name in exempt) != (name in compressor.exempted):
            then = "exempt" if name in exempt else "compressed"
            raise ValueError(f"The state loaded has {name} {then}: give exempt= as it was when the state was saved.")
    missing = [name for name in sizes if name not in known]
    if known and missing:
        raise ValueError(
            f"The state loaded is of another model: it has no parameter {missing[0]}; load a state saved with this "
            "model."
        )


def merge_states(states: list[State], rank: int, world: int) -> tuple[State, Feedback]:
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
    for state in states:  # what is owed on one rank is compressed on all
        feedback.begun.update(state["errors"])
    return states[0], feedback
