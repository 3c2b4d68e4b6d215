"""Whose gradients a compressor averages that DDP was given by its own ``register_comm_hook``.

Note [Whose hook this is]
DDP passes a Python hook its state and a bucket, and neither says which ranks the module is trained on: without a
``process_group`` of its own, a compressor would average over the default one, silently, with ranks that train another
model. The module is in this process, and lists its hooks with their states; torch keeps no list of modules, so it is
looked for among all objects, once for each compressor.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel as DDP

from compress.contract import Contract
from dear import _refusals


def take_group(compressor: Contract) -> None:
    """Makes the compressor's process group that of the module whose hook it is, where one is known by now."""
    if compressor.binding is None and compressor.process_group is None and dist.is_initialized():
        groups = _groups([model for model in _modules() if _is_hook_of(compressor, model)])
        if len(groups) == 1 and groups[0] is not c10d._get_default_group():
            compressor.process_group = groups[0]


def group_of_hook(compressor: Contract, params: Sequence[Tensor]) -> dist.ProcessGroup:
    """The process group of the module that hands over a bucket of ``params``, unless the compressor was given one.

    Raises:
        ValueError: it cannot be known; or a state was loaded for other ranks.
    """
    if compressor.process_group is not None:
        return compressor.process_group
    holders = [model for model in _modules() if _holds(model, params)]
    # Where a hook of the user's own calls this one, DDP has another state.
    holders = [model for model in holders if _is_hook_of(compressor, model)] or holders
    for model in holders:
        _refusals.check_kind(model, "compress.comm_hook")
    groups = _groups(holders)
    if not groups and _only_group():  # gc.freeze() hides what there was before
        groups = [c10d._get_default_group()]
    if len(groups) != 1:
        raise ValueError(
            "compress.comm_hook cannot tell which process group these parameters are trained in, since "
            f"{len(groups)} were found: pass process_group= to the compressor."
        )
    check_loaded_for(compressor, groups[0])
    return groups[0]


def check_loaded_for(compressor: Contract, group: dist.ProcessGroup) -> None:
    """Refuses a state that was loaded for the default group's ranks, where the model's are others: each rank has the
    error feedback of its number.

    Raises:
        ValueError: one sentence says what to do.
    """
    if compressor.loaded is None or compressor.process_group is not None:
        return
    if dist.get_process_group_ranks(group) != dist.get_process_group_ranks(compressor.ranks()):
        raise ValueError(
            "The compressor's state was loaded for the ranks of the default process group, and the model is trained "
            "in another one: pass process_group= to the compressor, or load the state when it serves the model."
        )


def _modules() -> list[Any]:
    # By its type: isinstance() asks objects of all kinds for their class, and some do things then.
    return [each for each in gc.get_objects() if DDP in type(each).__mro__]


def _is_hook_of(compressor: Contract, model: Any) -> bool:
    return any(state is compressor for _, state in vars(model).get("_comm_hooks", ()))


def _holds(model: Any, params: Sequence[Tensor]) -> bool:
    return {id(param) for param in params} <= {id(param) for param in vars(model).get("_module_parameters", ())}


def _groups(models: Sequence[Any]) -> list[dist.ProcessGroup]:
    groups: list[dist.ProcessGroup] = []
    for model in models:
        if all(model.process_group is not group for group in groups):
            groups.append(model.process_group)
    return groups


def _only_group() -> bool:
    """Whether a model can be trained in no other group than the default one; lanes have groups of their own."""
    default = c10d._get_default_group()
    return all(group is default or group.group_desc.startswith("dear ") for group in c10d._world.pg_map)
