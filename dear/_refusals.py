"""What is refused before anything is changed: modules, optimizers and parameters that the schedule cannot serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _ddp
from dear._compiled import is_wrapper
from dear._look_again import check_members
from dear._names import named_modules
from dear._optimizer import is_initialized
from dear._pending import can_be_pending


def check_kind(model: Any, caller: str) -> None:
    """Refuses what is no DDP module, and so has no ranks who could be told.

    Raises:
        TypeError: one sentence that says what it is instead.
        ValueError: its ranks are not those of a group that can be known.
    """
    if is_wrapper(model) and isinstance(model._orig_mod, DDP):
        raise TypeError(
            f"{caller} needs the DistributedDataParallel module itself, which torch.compile has wrapped here: call it "
            "before torch.compile, or pass the module under it, model._orig_mod."
        )
    if not isinstance(model, DDP):
        raise TypeError(
            f"{caller} needs a DistributedDataParallel module, not {type(model).__name__}: wrap the model in "
            "torch.nn.parallel.DistributedDataParallel first, or attach by dear.integrations where a framework wraps "
            "it."
        )
    if model.process_group not in c10d._world.pg_map:
        raise ValueError(
            f"The process group of this DDP module is a {type(model.process_group).__name__} that torch.distributed "
            "did not make, as those of torchft, whose members may change between two steps: build DDP on a group of "
            "init_process_group() or new_group()."
        )


def check_hookable(model: DDP) -> None:
    """Refuses a module that can take no native hook, or makes gradients that no hook of this library can reduce.

    Raises:
        ValueError, RuntimeError: one sentence that says what is wrong and what to do.
    """
    if getattr(model, _ddp.ENGINE, None):
        raise RuntimeError(
            "This DDP module is attached already, and DDP takes only one communication hook: pass a compressor to "
            "dear.attach(), or call engine.detach() first."
        )
    if getattr(model, "_delay_all_reduce_params", None):
        raise ValueError(
            "With delay_all_reduce_named_params DDP reduces parameters by a hook of its own, which no step waits for: "
            "leave the option out."
        )
    if _ddp.has_hook(model):
        raise RuntimeError(
            "This DDP module has a communication hook already, and DDP takes only one: use a module on which "
            "register_comm_hook() was not called."
        )
    if model.mixed_precision is not None:
        raise ValueError(
            "DDP's own mixed_precision uses the communication hook's place: leave it out and use torch.autocast, or "
            "keep the parameters in 16 bits."
        )
    if model._use_python_reducer or torch._dynamo.config.optimize_ddp in ("python_reducer",):
        raise ValueError(
            'With torch._dynamo.config.optimize_ddp="python_reducer" DDP never calls a native hook: set it to '
            '"ddp_optimizer" before the model is wrapped.'
        )
    embeddings = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    sparse = [n for n, module in named_modules(model.module) if isinstance(module, embeddings) and module.sparse]
    if sparse:
        raise ValueError(
            f"The module {sparse[0] or type(model.module).__name__} makes sparse gradients, which cannot be reduced in "
            "shards: build it with sparse=False."
        )


def check_optimizer(optimizer: Any, caller: str) -> None:
    """Refuses what is no optimizer.

    Raises:
        TypeError: one sentence says what it is instead.
    """
    if isinstance(optimizer, type):
        name = optimizer.__name__
        raise TypeError(f"{name} is a class: pass an optimizer made of it, such as {name}(model.parameters(), lr=0.1).")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{caller} needs a torch.optim.Optimizer, not {type(optimizer).__name__}.")


def check(model: DDP, optimizers: Sequence[Any], group: dist.ProcessGroup | None) -> None:
    """Refuses what the schedule cannot work with, before anything is changed.

    Raises:
        TypeError, ValueError, RuntimeError: one sentence that says what is wrong and what to do.
    """
    for optimizer in optimizers:
        check_optimizer(optimizer, "dear.attach()")
        if not is_initialized(optimizer):
            raise TypeError(
                f"{type(optimizer).__name__} is a wrapper around an optimizer, which never called Optimizer.__init__()"
                ", and holds none in .optimizer: pass the optimizer inside."
            )
        if getattr(model, _ddp.ENGINE, None) or getattr(optimizer, _ddp.ENGINE, None):
            raise RuntimeError("This model or optimizer is attached already: call engine.detach() on the first engine.")
        if isinstance(optimizer, torch.optim.SparseAdam):
            raise ValueError("SparseAdam wants sparse gradients, which cannot be reduced in shards: use Adam.")
    check_hookable(model)
    _check_scripted(model)
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, not {type(group).__name__}.")
    if group is not None and dist.get_process_group_ranks(group) != dist.get_process_group_ranks(model.process_group):
        raise ValueError("process_group must have the ranks of the DDP module's own group: build DDP on that group.")
    _check_parameters(model, optimizers)


def _check_parameters(model: DDP, optimizers: Sequence[Optimizer]) -> None:
    names = _ddp.parameter_names(model)
    devices = sorted({str(param.device) for param in names if param.requires_grad})
    if len(devices) > 1:
        raise ValueError(f"The model's parameters lie on {' and '.join(devices)}: put the model on one device.")
    trained = _ddp.reduced_parameters(model)
    for param in trained:
        if param.is_complex():
            raise ValueError(
                f"The parameter {names[param]} is complex, which the collectives do not sum: hold it as a real tensor "
                "with torch.view_as_real."
            )
        if hasattr(param, "_in_backward_optimizers"):
            raise ValueError(
                f"The parameter {names[param]} is updated in backward by _apply_optimizer_in_backward(), before its "
                "gradient is reduced: use an ordinary optimizer."
            )
        if not can_be_pending(param):
            raise ValueError(
                f"The parameter {names[param]} is a {type(param).__name__}, whose class cannot be changed while its "
                "update is under way: make it a torch.nn.Parameter."
            )
    if any(hasattr(param, "device_mesh") for param in model.module.parameters()):
        raise ValueError(
            "This model's parameters are DTensors, which DDP does not reduce either: wrap it with device_mesh=, the "
            "dimension of the mesh over which data is parallel, and DDP takes their local parts."
        )
    members = [p for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]]
    check_members(members, names, set(trained))


def _check_scripted(model: DDP) -> None:
    for name, module in named_modules(model.module):
        if isinstance(module, torch.jit.ScriptModule) and next(module.parameters(), None) is not None:
            raise ValueError(
                f"The module {name or type(model.module).__name__} was made by torch.jit, and reads its parameters "
                "where nothing can wait for them: use torch.compile in its place, or compress.register(), which takes "
                "it."
            )
