"""Optimizer state between its two forms: in parts (by segment, on its owner) and full (by parameter, as torch saves
it)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from dear import _C
from dear._layout import Layout, Segment
from dear._objects import all_gather_object

FullState = dict[torch.Tensor, dict[str, Any]]  # keyed by parameter
Facts = dict[str, tuple[str, Any]]  # of a parameter's state, by key: how a value travels, and what is told of it

# State that is one number for a parameter, also where the parameter has just one element itself.
SCALARS = {"step", "eta", "mu", "mu_product"}


def is_elementwise(key: str, value: Any, owner: torch.Tensor) -> bool:
    """Whether it is one value for each element of its owner."""
    return isinstance(value, torch.Tensor) and key not in SCALARS and value.shape == owner.shape


def kind(state: dict[str, Any]) -> Hashable:
    """What must be equal for two parameters' states to live in one segment."""
    scalars = tuple((key, float(value)) for key, value in sorted(state.items()) if key in SCALARS)
    return tuple(sorted(state)), scalars


def scatter(full: FullState, segments: list[Segment]) -> dict[torch.Tensor, dict[str, Any]]:
    """This rank's part of a full state, keyed by the segments' tensors."""
    sharded: dict[torch.Tensor, dict[str, Any]] = {}
    for segment in segments:
        example = full.get(segment.places[0].param)
        if not example:
            continue
        state: dict[str, Any] = {}
        for key, value in example.items():
            if not is_elementwise(key, value, segment.places[0].param):
                state[key] = value.clone() if isinstance(value, torch.Tensor) else value
                continue
            parts = [segment.part(place, full[place.param][key]) for place in segment.places]
            state[key] = parts[0].clone() if segment.whole else torch.cat(parts)
        sharded[segment.tensor] = state
    return sharded


def placed(param: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state that was read on the host, where torch's own loading puts it: beside the parameter, but for
    the number of steps, which stays unless the update reads it on a GPU."""
    counts_there = group.get("fused") or group.get("capturable")
    return {
        key: value.to(param.device) if isinstance(value, torch.Tensor) and (key != "step" or counts_there) else value
        for key, value in state.items()
    }


def _fact(key: str, value: Any, owner: torch.Tensor) -> tuple[str, Any]:
    """What the other ranks are told of a state: the values themselves travel flat if there is one for each element."""
    if is_elementwise(key, value, owner):
        return "flat", value.dtype
    if isinstance(value, torch.Tensor):
        return ("same" if value.device.type == "cpu" else "beside"), value.cpu()
    return "same", value


def gather(
    sharded: dict[torch.Tensor, dict[str, Any]],
    segments: list[Segment],
    layout: Layout,
    lane: _C.Lane,
) -> FullState:
    """The full state on every rank. Collective: every rank of ``lane`` must call it."""
    known = _facts_of_all(sharded, segments, layout, lane)
    full: FullState = {param: _not_flat(facts, layout.full[0].device) for param, facts in known.items()}
    for bucket in range(len(layout.full)):
        here = [place for place in layout.in_bucket(bucket) if place.param in known]
        kinds = {kind for place in here for kind in _flat_kinds(known[place.param])}
        for key, dtype in sorted(kinds, key=str):
            flat = _parts_of(key, dtype, bucket, sharded, segments, layout)
            layout.gather(lane, bucket, flat, f"optimizer state {key}")
            for place in here:
                if (key, dtype) in _flat_kinds(known[place.param]):
                    whole = torch.empty_strided(place.param.size(), place.stride, dtype=dtype, device=flat.device)
                    full[place.param][key] = whole.copy_(place.view(flat))
    return full


def _facts_of_all(
    sharded: dict[torch.Tensor, dict[str, Any]], segments: list[Segment], layout: Layout, lane: _C.Lane
) -> dict[torch.Tensor, Facts]:
    """Which parameters have which state, in the layout's order; a rank knows it of those it owns a part of."""
    position = {place.param: index for index, place in enumerate(layout.places)}
    mine: dict[int, Facts] = {}
    for segment in segments:
        state = sharded.get(segment.tensor)
        if state:
            facts = {key: _fact(key, value, segment.tensor) for key, value in state.items()}
            mine.update(dict.fromkeys((position[place.param] for place in segment.places), facts))
    everyone = all_gather_object(lane, mine, "the optimizer's state", layout.full[0].device)
    known = {index: facts for one in everyone for index, facts in one.items()}
    return {layout.places[index].param: known[index] for index in sorted(known)}


def _not_flat(facts: Facts, device: torch.device) -> dict[str, Any]:
    """What was told in full. A copy: parameters of one segment must not share the tensor that counts their steps."""
    return {
        key: value.to(device if how == "beside" else "cpu", copy=True) if isinstance(value, torch.Tensor) else value
        for key, (how, value) in facts.items()
        if how != "flat"
    }


def _flat_kinds(facts: Facts) -> set[tuple[str, torch.dtype]]:
    """Key and type of what has a value for each element."""
    return {(key, dtype) for key, (how, dtype) in facts.items() if how == "flat"}


def _parts_of(
    key: str,
    dtype: torch.dtype,
    bucket: int,
    sharded: dict[torch.Tensor, dict[str, Any]],
    segments: list[Segment],
    layout: Layout,
) -> torch.Tensor:
    """A bucket's flat buffer of that state, in which this rank's part is filled."""
    buffer = layout.full[bucket]
    flat = torch.zeros(buffer.numel(), dtype=dtype, device=buffer.device)
    for segment in segments:
        part = sharded.get(segment.tensor, {}).get(key) if segment.bucket == bucket else None
        if part is not None and is_elementwise(key, part, segment.tensor) and part.dtype == dtype:
            segment.view(flat).copy_(part)
    return flat
