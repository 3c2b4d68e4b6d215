"""Accelerate: ``attach(accelerator, model, optimizer)`` after ``accelerator.prepare()``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from dear.integrations._session import Session, read_file, uncompiled_model, write_file

__all__ = ["attach", "inner_optimizer"]


def attach(
    accelerator: Any,
    model: DDP,
    optimizer: Any | Sequence[Any],
    *,
    register: Callable[[DDP, Any], Any] | None = None,
    **options: Any,
) -> Any:
    """Puts the schedule under what ``accelerator.prepare()`` returned; the loop stays as it is.

    ``accelerator.clip_grad_norm_``, ``clip_grad_value_``, ``accumulate`` and its GradScaler work. ``save_state`` saves
    the optimizer's full state, and a file ``dear.pt`` beside it with the compressor's, the order of the buckets, and
    what a tuner or ``"auto"`` has found; ``load_state`` takes both, and plain DDP's checkpoints too.

    Args:
        accelerator: an ``accelerate.Accelerator`` with several processes.
        model: the DDP module that ``prepare()`` returned.
        optimizer: the wrapped optimizer that ``prepare()`` returned, or a list of several.
        register: ``compress.register`` puts ``options["compressor"]`` on as a plain hook, without the schedule.
        options: of :func:`dear.attach`.

    Returns:
        The :class:`dear.Engine`; with ``register`` what that has returned, whose ``remove()`` takes a compressor off.

    Raises:
        TypeError: ``prepare()`` was not called yet, or has wrapped the model in something else.
    """
    module = uncompiled_model(model)
    if not isinstance(module, DDP):
        raise TypeError(
            "attach() needs the DistributedDataParallel module that accelerator.prepare() returns where there are "
            f"several processes, not {type(module).__name__}: call it after prepare(), in a script that torchrun or "
            "accelerate launch has started, without FSDP or DeepSpeed."
        )
    session = Session(options, register)
    wrapped = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    inner = [inner_optimizer(each) for each in wrapped]
    _warn_if_loaded_before(inner, options.get("compressor"))
    engine = session.begin(module, inner)
    for each in wrapped:
        remember_step(each)
    unread: set[torch.optim.Optimizer] = set()

    def before_save(models: Any, weights: Any, folder: str) -> None:
        state = session.state()
        if accelerator.is_main_process:
            write_file(folder, state)
        session.show_full_state()
        unread.update(inner)

    def before_load(models: Any, folder: str) -> None:
        session.load(read_file(folder), folder)

    accelerator.register_save_state_pre_hook(before_save)
    accelerator.register_load_state_pre_hook(before_load)

    def was_read(of: torch.optim.Optimizer, state: Any) -> None:
        """save_state() reads each optimizer's state once, on every rank."""
        unread.discard(of)
        if not unread:
            session.hide_full_state()

    for each in inner:
        each.register_state_dict_post_hook(was_read)
    return engine if register is None else session.registration


def _warn_if_loaded_before(optimizers: Sequence[torch.optim.Optimizer], compressor: Any) -> None:
    """A compressor's state is loaded by what ``attach`` registers."""
    if getattr(compressor, "error_feedback", False) and compressor.step == 0 and any(each.state for each in optimizers):
        warnings.warn(
            "The optimizer has a state, and the compressor has no error feedback: if accelerator.load_state() was "
            "called, call it after attach(), which has both loaded then.",
            stacklevel=3,
        )


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's wrappers."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def remember_step(optimizer: Any) -> None:
    """With a GradScaler Accelerate's wrapper holds the ``step`` that the optimizer had before; it looks again when its
    state is set."""
    if hasattr(optimizer, "__setstate__") and hasattr(optimizer, "optimizer"):
        optimizer.__setstate__({})
