"""Compression as a plain DDP communication hook: ``.grad`` is the aggregated gradient after ``backward()``.

Note [What a hook sees of the model]
DDP hands over buckets of parameters, never their names, and rebuilds the buckets once, at the second step. State is
kept by name. :func:`register` knows the names, and has DDP rebuild at the end of the first backward pass. Under DDP's
own ``register_comm_hook`` each parameter is called by the order in which it was first seen and its shape, "parameter 3
[16, 37]", and recognised by identity from then on; the order is that of the first backward pass, which is the same on
all ranks and whenever the same model is trained, so saved state fits. States saved under the two kinds of names do not
mix.
"""

# Annotations are not postponed here: DDP compares a hook's with the types themselves.

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel as DDP

from compress.checks import REMEDY, check_new, facts
from compress.compressor import Compressor
from compress.hook_binding import HookBinding
from compress.model_group import group_of_hook
from compress.two_levels import TwoLevels
from dear import _refusals
from dear._agree import agree, meet_on
from dear._nodes import Hierarchy, check_hierarchy, find_nodes
from dear.compression import check_kind


def comm_hook(state: Compressor, bucket: dist.GradBucket) -> Future[Tensor]:
    """A DDP communication hook: ``model.register_comm_hook(compress.ACPSGD(rank=4), compress.comm_hook)``.

    The ranks of the module's process group take part, unless the compressor was given another as ``process_group``: see
    Note [Whose hook this is] in :mod:`compress.model_group`. Encoding happens at once, on the autograd thread;
    exchanges and decoding go on while backward does.

    Raises, from ``backward()``:
        TypeError: the state is not a compressor.
        ValueError: ranks are not configured alike, or something cannot be compressed; the same on every rank. Or the
            module's process group cannot be known.
        RuntimeError: a peer has died or stalled; or a gradient is not finite, with ``nonfinite="raise"``.
    """
    check_kind(state, "compress.comm_hook")
    if state.binding is None:
        device = bucket.buffer().device
        group = group_of_hook(state, bucket.parameters())
        meet_on(group, device)
        agree(group, lambda: facts(state), REMEDY)
        state.process_group = group
        state.binding = HookBinding(state, device)
    future = state.binding.native.on_bucket(bucket)
    if bucket.is_last():
        state.binding.check_names()
    # DDP wants a future of a Python object from a Python hook; the native one holds a tensor.
    return future.then(_value)  # type: ignore[no-any-return]


def _value(future: Future[Tensor]) -> Tensor:
    return future.value()


class Registration:
    """A compressor at work as the hook of a DDP module: what :func:`register` returns."""

    def __init__(self, model: DDP, compressor: Compressor, binding: HookBinding) -> None:
        self._model, self._compressor, self._binding = model, compressor, binding

    def remove(self) -> None:
        """Gives the module back to plain DDP. The compressor keeps its state, and may serve a module again.

        Between two steps; every rank must call it. Nothing happens where another one has taken its place.
        """
        if self._compressor.binding is self._binding:
            self._binding.release()
            self._model._comm_hooks = [hook for hook in self._model._comm_hooks if hook[1] is not self._compressor]


def register(model: DDP, compressor: Compressor, *, hierarchy: Hierarchy = None) -> Registration:
    """Makes ``compressor`` the communication hook of a DDP module, natively: no step takes the interpreter lock.

    As ``model.register_comm_hook(compressor, compress.comm_hook)``; and it checks first what can be checked, saves
    state under the names of ``model.module``, and keeps the error feedback of parameters that no rank has used in a
    step, which that call cannot know. Compressors written in Python take the lock for their own work only. Every rank
    must call it.

    Args:
        model: the DDP module, without a communication hook.
        compressor: serves no other model.
        hierarchy: ``"node"`` averages inside each node first, and compresses between nodes alone; see
            :func:`dear.attach`.

    Returns:
        What takes the compressor off again: its ``remove()``, on every rank.

    Raises:
        TypeError, ValueError, RuntimeError: this cannot work; one sentence says why, on every rank, and nothing has
            been changed.
    """
    _refusals.check_kind(model, "compress.register()")

    def look() -> dict[str, Any]:
        known = check_new(compressor, model, "compress.register()")
        _refusals.check_hookable(model)
        check_hierarchy(hierarchy)
        return known | {"hierarchy": hierarchy}

    meet_on(model.process_group, model.device)
    agree(model.process_group, look, REMEDY)
    compressor.process_group = model.process_group
    compressor.levels = TwoLevels.between(find_nodes(model.process_group, hierarchy), model)
    device = next(iter(model.module.parameters())).device
    compressor.binding = binding = HookBinding(compressor, device, model)
    binding.register()
    model._comm_hooks.append((comm_hook, compressor))  # as register_comm_hook() does: who has the model has it
    return Registration(model, compressor, binding)
