"""Checkpoints by :mod:`torch.distributed.checkpoint` (DCP) of which no rank holds all: each writes and reads its part.

``save(path, model, optimizer, engine)`` and ``load(path, model, optimizer, engine)``, on every rank. With sharded and
owned updates the optimizer's state is never gathered, and neither is a compressor's. The file is an ordinary DCP
checkpoint under ``"model"`` and ``"optimizer"``, by parameter name, in the parameters' own shapes: plain DDP and FSDP
read it, and theirs is read here.

Note [A checkpoint that is there is whole]
All write into a folder beside ``path``; it gets its name when everything has been written and flushed. A job that dies
meanwhile leaves ``path`` as it was, which is: not there. ``save()`` never writes to one that is.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear._agree import agree
from dear._ddp import parameter_names, reduced_parameters
from dear._layout import stride_in_bucket
from dear._optimizer import unwrapped
from dear._state import SCALARS
from dear._state_parts import InParts, LoadedState
from dear.engine import Engine
from dear.integrations._pieces import Pieces
from dear.integrations._session import warn_without_feedback

__all__ = ["load", "save"]


def save(path: str | os.PathLike[str], model: DDP, optimizer: Optimizer | Sequence[Optimizer], engine: Engine) -> None:
    """Writes a checkpoint into the new folder ``path``, all of it or nothing. Every rank must call it alike.

    Raises:
        ValueError: ``path`` is there already.
    """
    path = os.fspath(path)
    partial, group = path.rstrip("/") + ".partial", engine.process_group

    def look() -> dict[str, Any]:
        if os.path.exists(path):
            raise ValueError(f"{path} is there already: save each checkpoint into a folder of its own.")
        return {"path": path}

    agree(group, look, "every rank must save to the same path")
    if group.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of one that was interrupted
    engine.synchronize()
    state = {
        "model": get_model_state_dict(model),
        "optimizer": _optimizer_state(model, _listed(optimizer), engine),
        "engine": {str(group.rank()): _packed(engine.state_dict(optimizer=False, gather=False))},
    }
    dcp.save(state, checkpoint_id=partial, process_group=group)
    if group.rank() == 0:  # who is told last that all have written
        os.rename(partial, path)
    agree(group, dict, "every rank must come to the end of the checkpoint")


def load(path: str | os.PathLike[str], model: DDP, optimizer: Optimizer | Sequence[Optimizer], engine: Engine) -> None:
    """Takes a checkpoint of :func:`save`, at any number of ranks, or one that DCP wrote for plain DDP or FSDP under
    ``"model"`` and ``"optimizer"``. Every rank must call it alike, before training or between two steps.

    What the checkpoint has no part of stays as it is.

    Raises:
        ValueError: ``path`` holds no whole checkpoint, or one of another model.
    """
    path, group, optimizers = os.fspath(path), engine.process_group, _listed(optimizer)
    engine.synchronize()
    read: list[Metadata] = []

    def look() -> dict[str, Any]:
        if not os.path.exists(os.path.join(path, ".metadata")):
            raise ValueError(f"{path} holds no whole checkpoint: pass a folder that save() has made.")
        read.append(dcp.FileSystemReader(path).read_metadata())
        return {"the number of entries": len(read[0].state_dict_metadata)}

    agree(group, look, "every rank must load the same checkpoint")
    (metadata,) = read
    _load_engine(path, metadata, engine)  # first: it may change who has which part of the optimizer's state
    weights = get_model_state_dict(model)
    wanted: dict[str, Any] = {f"model.{name}": value for name, value in weights.items()}
    update, loaded = engine._update, None
    if isinstance(update, InParts):
        loaded = _Template(metadata, model, optimizers, group.rank(), group.size())
        wanted |= loaded.wanted
    else:
        wanted |= _whole_state(metadata)
    dcp.load(wanted, checkpoint_id=path, process_group=group)

    set_model_state_dict(model, {name: wanted[f"model.{name}"] for name in weights})
    if isinstance(update, InParts) and loaded is not None:
        loaded.finish(wanted)
        update.load_state_parts(loaded.state)
    else:
        with engine.full_state():
            set_optimizer_state_dict(model, optimizers, _nested(wanted, metadata))


def _load_engine(path: str, metadata: Metadata, engine: Engine) -> None:
    """What the engine had besides the optimizer's state; nothing, if plain DDP or FSDP has saved it. Collective."""
    group = engine.process_group
    wanted: dict[str, Any] = dict.fromkeys(_engines_of(metadata, group.rank(), group.size()), 0)
    if any(key.startswith("engine.") for key in metadata.state_dict_metadata):
        dcp.load(wanted, checkpoint_id=path, process_group=group)
        engine.load_state_dict(_merged([torch.load(io.BytesIO(each), weights_only=True) for each in wanted.values()]))
    else:
        warn_without_feedback(path, engine.compressor)


def _listed(optimizer: Any) -> list[Optimizer]:
    return [unwrapped(each) for each in (optimizer if isinstance(optimizer, (list, tuple)) else [optimizer])]


def _packed(state: Any) -> bytes:
    data = io.BytesIO()
    torch.save(state, data)
    return data.getvalue()


# --- saving ---


def _optimizer_state(model: DDP, optimizers: list[Optimizer], engine: Engine) -> dict[str, Any]:
    """As ``get_optimizer_state_dict`` gives it, where each rank has its part of the tensors."""
    parts = engine._update.state_parts() if isinstance(engine._update, InParts) else None
    if parts is None:
        with engine.full_state():
            return get_optimizer_state_dict(model, optimizers)
    names: dict[torch.Tensor, str] = dict(parameter_names(model).items())
    state: dict[str, dict[str, Any]] = {}
    for param, rest in parts.rest.items():
        state.setdefault(names[param], {}).update(rest)
    for param, keys in parts.runs.items():
        for key, runs in keys.items():
            state.setdefault(names[param], {})[key] = Pieces.of(param.size(), stride_in_bucket(param), runs)
    groups = [
        {key: [names[param] for param in value] if key == "params" else value for key, value in group.items()}
        for each in optimizers
        for group in each.param_groups
    ]
    return {"state": state, "param_groups": groups}


# --- loading ---


def _engines_of(metadata: Metadata, rank: int, world: int) -> list[str]:
    """The entries with what engines had besides the optimizer's state: this rank's at the same number of ranks, or
    all."""
    keys = [key for key in metadata.state_dict_metadata if re.fullmatch(r"engine\.\d+", key)]
    if len(keys) == world:
        return [f"engine.{rank}"]
    return sorted(keys, key=lambda key: int(key.partition(".")[2]))


def _merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    if len(states) == 1:
        return states[0]
    compressors = [state["compressor"] for state in states if "compressor" in state]
    return states[0] | ({"compressor": {"ranks": compressors}} if compressors else {})


def _empty(entry: Any) -> Any:
    """What DCP puts the entry into."""
    return torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else 0


def _paths(metadata: Metadata) -> dict[str, tuple[Any, ...]]:
    """Where the entries of the optimizer's state stand in it."""
    known = metadata.planner_data or {}
    return {key: path[1:] for key, path in known.items() if path and path[0] == "optimizer"}


def _whole_state(metadata: Metadata) -> dict[str, Any]:
    return {key: _empty(metadata.state_dict_metadata[key]) for key in _paths(metadata)}


def _nested(wanted: dict[str, Any], metadata: Metadata) -> dict[str, Any]:
    paths = _paths(metadata)
    return {"state": {}} | unflatten_state_dict({key: wanted[key] for key in paths}, paths)  # none leaves no entry


class _Template:
    """What this rank reads of an optimizer's state: an equal run of each parameter, and some of what is not one value
    for each element."""

    def __init__(self, metadata: Metadata, model: DDP, optimizers: list[Optimizer], rank: int, world: int) -> None:
        self._metadata, self._optimizers = metadata, optimizers
        self._names: dict[torch.Tensor, str] = dict(parameter_names(model).items())
        updated = {param for each in optimizers for group in each.param_groups for param in group["params"]}
        paths = _paths(metadata)
        self._entries = self._entries_of(paths, updated)
        self._groups = {key: path for key, path in paths.items() if path[0] == "param_groups"}
        alone = updated - set(reduced_parameters(model))
        kinds = self._kinds()
        self.state = LoadedState(kinds, alone, rank, world)
        self.wanted = {key: _empty(metadata.state_dict_metadata[key]) for key in self._groups}
        numbers = {param: number for number, param in enumerate(kinds)}
        for key, (param, name) in self._entries.items():
            if name in kinds[param]:
                runs = self.state.parts.runs[param][name]
                self.wanted[key] = Pieces.of(param.size(), stride_in_bucket(param), runs)
            elif param in alone or numbers[param] % world == rank:
                self.wanted[key] = _empty(metadata.state_dict_metadata[key])

    def _entries_of(
        self, paths: dict[str, tuple[Any, ...]], updated: set[torch.Tensor]
    ) -> dict[str, tuple[torch.Tensor, str]]:
        """By the entry's key, of which parameter it is the state, and what of it."""
        by_name = {name: param for param, name in self._names.items() if param in updated}
        return {
            key: (by_name[path[1]], path[2])
            for key, path in paths.items()
            if path[0] == "state" and len(path) == 3 and path[1] in by_name
        }

    def _kinds(self) -> dict[torch.Tensor, dict[str, torch.dtype]]:
        """By parameter, the types of the entries with one value for each element."""
        kinds: dict[torch.Tensor, dict[str, torch.dtype]] = {}
        for key, (param, name) in self._entries.items():
            of_param, entry = kinds.setdefault(param, {}), self._metadata.state_dict_metadata[key]
            if isinstance(entry, TensorStorageMetadata) and _in_runs(param, name, entry):
                of_param[name] = entry.properties.dtype
        return kinds

    def finish(self, read: dict[str, Any]) -> None:
        """Everything has been read: what is not in runs goes to the state, hyper-parameters to the optimizers."""
        for key, (param, name) in self._entries.items():
            if key in self.wanted and not isinstance(self.wanted[key], Pieces):
                self.state.parts.rest.setdefault(param, {})[name] = read[key]
        groups = unflatten_state_dict({key: read[key] for key in self._groups}, self._groups).get("param_groups", [])
        of = {name: group for group in groups for name in group["params"]}
        for each in self._optimizers:
            for group in each.param_groups:
                found: dict[str, Any] = next((of[self._names[p]] for p in group["params"] if self._names[p] in of), {})
                group.update({key: value for key, value in found.items() if key != "params"})


def _in_runs(param: torch.Tensor, key: str, entry: TensorStorageMetadata) -> bool:
    """Whether the entry has one value for each element of the parameter, which has some."""
    return key not in SCALARS and entry.size == param.size() and param.numel() > 0
