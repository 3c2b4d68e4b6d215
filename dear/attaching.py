"""``dear.attach``: checks that the schedule can work here, and puts it to work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _ddp
from dear._agree import agree
from dear._fusion import MIB, check_cap, default_group_bytes
from dear._update import choose_mode
from dear.collectives import choose_algorithm
from dear.engine import Engine

if TYPE_CHECKING:
    from compress import Compressor


def attach(
    model: DDP,
    optimizer: Optimizer,
    *,
    compressor: Compressor | None = None,
    update: str = "auto",
    bucket_cap_mb: float | Literal["auto"] = "auto",
    overlap_forward: bool = True,
    process_group: dist.ProcessGroup | None = None,
    algorithm: str | None = None,
) -> Engine:
    """Puts the DeAR schedule under a DDP module and its optimizer; the training loop stays as it is.

    Every rank of the module's process group must call it alike. The optimizer's ``step`` and the module's parameters
    are taken over until :meth:`Engine.detach`.

    Args:
        model: the DDP module as built, without a communication hook.
        optimizer: any torch optimizer over its parameters.
        compressor: shrinks what both halves send, such as ``compress.ACPSGD(rank=4)``; its second phase moves under
            the next forward pass, and the update is replicated. A gradient that is not finite shows at ``step()``.
        update: ``"sharded"``: each rank updates its shard of the parameters between the halves, and the updated
            parameters are gathered (optimizer state and work divided by the world size; for elementwise optimizers).
            ``"replicated"``: averaged gradients are gathered and every rank updates everything, each layer when its
            gradients have come. ``"auto"``: sharded where the optimizer is known to be elementwise and nothing is
            compressed.
        bucket_cap_mb: size of a fusion group in MiB of gradients; ``"auto"`` takes a sixteenth of the model's, from 1
            to 25, and more of what a compressor shrinks. Smaller groups overlap better, larger ones cost fewer
            messages. Where DDP's own buckets are larger, DDP is made to bucket finer.
        overlap_forward: False waits for the all-gathers in ``step()``: a drop-in for code that reads parameters
            right after it.
        process_group: must have the ranks of the module's own group, which is the default.
        algorithm: ``"ring"``, ``"native"`` or None to choose by backend; see :mod:`dear.collectives`.

    Returns:
        The :class:`Engine`, also a context manager that detaches at its end.

    Raises:
        TypeError, ValueError, RuntimeError: something cannot work (see the README's list), on this rank or another;
            one sentence says what and what to do, on every rank, and nothing has been changed.

    Source: Zhang et al., "Decoupling the All-Reduce Primitive for Accelerating Distributed Deep Learning", 2023;
    sharded update: Rajbhandari et al., "ZeRO", 2020, stage 1.
    """
    _ddp.check_kind(model, "dear.attach()")
    group = process_group if process_group is not None else model.process_group
    options: dict[str, Any] = {}

    def look() -> dict[str, Any]:
        _ddp.check(model, optimizer, process_group)
        mode = choose_mode(optimizer, update, compresses=compressor is not None)
        known = {"the compressor": None} if compressor is None else _check_compressor(compressor, model)
        cap = bucket_cap_mb
        if cap == "auto":
            trained = sum(param.nbytes for param in model.module.parameters() if param.requires_grad)
            cap = default_group_bytes(trained, 1.0 if compressor is None else compressor.usual_ratio) / MIB
        check_cap(cap)
        device = next(param.device for param in model.module.parameters() if param.requires_grad)
        chosen = choose_algorithm(group, device, algorithm)
        options.update(mode=mode, bucket_cap_mb=cap, algorithm=chosen, device=device)
        known |= {"update": mode, "bucket_cap_mb": cap, "algorithm": chosen}
        return known | {"optimizer": type(optimizer).__name__, "overlap_forward": overlap_forward}

    agree(model.process_group, look, "every rank must call dear.attach() with the same arguments")
    return Engine(model, optimizer, overlap_forward=overlap_forward, group=group, compressor=compressor, **options)


def _check_compressor(compressor: Compressor, model: DDP) -> dict[str, Any]:
    from compress import checks  # compress needs dear

    return checks.check_new(compressor, model, "dear.attach()")
