"""``dear.attach``: checks that the schedule can work here, and puts it to work."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _C, _ddp, preconditioning
from dear._agree import agree
from dear._assembly import STRATEGIES, Ground, Setting, choose_strategy, usual_cap
from dear._context import StepContext, ordinary
from dear._fusion import check_cap
from dear._look_again import overlapping
from dear._nodes import check_hierarchy, find_nodes
from dear._optimizer import UserOptimizer, unwrapped
from dear._replicas import check_interval
from dear._replicated import ReplicatedUpdate
from dear._update import Request
from dear.choosing import Chooser, Steering, auto, is_chooser
from dear.collectives import choose_algorithm
from dear.compression import Compressor, check_kind
from dear.engine import Engine


def attach(
    model: DDP,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    compressor: Compressor | Chooser | Literal["auto"] | None = None,
    preconditioner: preconditioning.Preconditioner | None = None,
    update: str = "auto",
    bucket_cap_mb: float | Literal["auto"] = "auto",
    overlap_forward: bool = True,
    process_group: dist.ProcessGroup | None = None,
    algorithm: str | None = None,
    check_replicas: int = 1000,
    hierarchy: int | Literal["node"] | None = None,
) -> Engine:
    """Puts the DeAR schedule under a DDP module and its optimizer; the training loop stays as it is.

    Every rank of the module's process group must call it alike. The optimizer's ``step`` and the module's parameters
    are taken over until :meth:`Engine.detach`.

    Args:
        model: the DDP module as built, without a communication hook.
        optimizer: any torch optimizer over its parameters, or a wrapper that holds one in ``.optimizer``; or several,
            such as Muon for matrices and AdamW for the rest, which step one after another, in the same order on every
            rank, each its own parameters.
        compressor: shrinks what both halves send, such as ``compress.ACPSGD(rank=4)``; its second phase moves under
            the next forward pass, and the update is replicated. A gradient that is not finite shows at ``step()``.
            ``"auto"`` chooses while training goes on, in at most 60 steps, among exact methods: update strategies,
            sizes of fusion groups, and plain DDP; ``compress.auto(loss=0.03)`` opens compressors, too. What is given as
            ``update`` or ``bucket_cap_mb`` stays. See "Planning".
        preconditioner: changes each layer's averaged gradient before the optimizer uses it, such as
            ``precondition.DPKFAC()``. Not with a compressor.
        update: ``"sharded"``: each rank updates its shard of the parameters between the halves, and the updated
            parameters are gathered (optimizer state and work divided by the world size; for elementwise optimizers).
            ``"owned"``: the same, but each parameter is one rank's, which updates it whole: for optimizers of matrices,
            such as Muon and Adafactor, and others that declare themselves so (``dear_whole``, see "How it works").
            ``"replicated"``: averaged gradients are gathered and every rank updates everything, each layer when its
            gradients have come. ``"auto"``: sharded where the optimizer is known to be elementwise, owned where it is
            known to update whole parameters or declares it, replicated where a gradient is compressed or two parameters
            share memory.
        bucket_cap_mb: size of a fusion group in MiB of gradients; ``"auto"`` takes a sixteenth of the model's, from 1
            to 25, and more of what a compressor shrinks; with owned updates as much as balances the ranks. Smaller
            groups overlap better, larger ones cost fewer messages. Where DDP's own buckets are larger, DDP is made to
            bucket finer.
        overlap_forward: False waits for the all-gathers in ``step()``.
        process_group: must have the ranks of the module's own group, which is the default.
        algorithm: ``"ring"``, ``"native"`` or None to choose by backend; see :mod:`dear.collectives`.
        check_replicas: every so many steps, ``step()`` waits until all parameters stand and compares their checksums
            with those of the other ranks, 8 bytes a parameter tensor and rank; where they differ, it raises
            RuntimeError on every rank, which names the ranks and a parameter. 0: never.
        hierarchy: ``"node"`` moves in two levels, inside each node and then between nodes, among ranks of equal place:
            a node's network port carries each element once, however many ranks the node has. The ranks of a node are
            found from LOCAL_RANK and LOCAL_WORLD_SIZE, or from the hosts' names; a number says how many consecutive
            ranks a node has. A compressor then works between nodes alone, on each node's mean, and its error feedback
            exists once in a node. None: one level.

    Returns:
        The :class:`Engine`, also a context manager that detaches at its end.

    Raises:
        TypeError, ValueError, RuntimeError: something cannot work, on this rank or another; one sentence says what
            and what to do, on every rank, and nothing has been changed.

    Source: Zhang et al., "Decoupling the All-Reduce Primitive for Accelerating Distributed Deep Learning", 2023;
    sharded update: Rajbhandari et al., "ZeRO", 2020, stage 1.
    """
    _ddp.check_kind(model, "dear.attach()")
    group = process_group if process_group is not None else model.process_group
    grounds: list[Ground] = []
    settings: list[Setting] = []
    choosers: list[tuple[Chooser, Steering]] = []
    optimizers = tuple(map(unwrapped, optimizer if isinstance(optimizer, (list, tuple)) else (optimizer,)))

    def look() -> dict[str, Any]:
        if not optimizers:
            raise ValueError("optimizer must be an optimizer or several, and an empty list was given.")
        _ddp.check(model, optimizers, process_group)
        check_hierarchy(hierarchy)
        known: dict[str, Any] = {"the compressor": None}
        chooser, given = _chooser_of(compressor)
        if chooser is not None:
            known = chooser.check_new(model, "dear.attach()")
        if given is not None:
            check_kind(given, "dear.attach()")
            known = given.check_new(model, "dear.attach()")
        teams: Sequence[preconditioning.Team] = ()
        served: Sequence[str] = tuple(STRATEGIES)
        if preconditioner is not None:
            preconditioning.check_kind(preconditioner, "dear.attach()")
            known |= preconditioner.check_new(model, optimizers, "dear.attach()")
            served, teams = preconditioner.updates, preconditioner.teams(model)
        request = Request(optimizers, given is not None, overlapping(_ddp.parameter_names(model)), teams)
        strategy = choose_strategy(request, update, served)
        cap = bucket_cap_mb
        if cap == "auto":
            cap = usual_cap(strategy, request, model, group.size(), 1.0 if given is None else given.usual_ratio)
        check_cap(cap)
        check_interval(check_replicas)
        device = _ddp.reduced_parameters(model)[0].device
        users = [UserOptimizer(each) for each in optimizers]
        algorithm_chosen = choose_algorithm(group, device, algorithm)
        ground = Ground(model, users, group, device, algorithm_chosen, None, preconditioner)
        setting = Setting(strategy.kind, cap, given)
        if chooser is not None:
            steering = Steering(ground, setting, update=update, tunes_cap=bucket_cap_mb == "auto")
            choosers.append((chooser, steering))
            setting = steering.setting = chooser.first(steering) or setting
            if setting.compressor is not None:
                setting.compressor.check_new(model, "dear.attach()")
        grounds.append(ground)
        settings.append(setting)
        return known | {
            "bucket_cap_mb": setting.bucket_cap_mb,
            "algorithm": algorithm_chosen,
            "update": setting.update,
            "optimizer": ", ".join(type(each).__name__ for each in optimizers),
            "overlap_forward": overlap_forward,
            "check_replicas": check_replicas,
            "hierarchy": hierarchy,
        }

    agree(model.process_group, look, "every rank must call dear.attach() with the same arguments")
    ground, setting = grounds[0], settings[0]
    ground = dataclasses.replace(ground, nodes=find_nodes(group, hierarchy))
    with ordinary(StepContext(ground.device, grad=False)):
        if choosers or setting.update != ReplicatedUpdate.kind:  # each rank's part of the parameters is handed to all
            _check_equal(model)
        engine = Engine(ground.assemble(setting), overlap_forward=overlap_forward, check_replicas=check_replicas)
        for chooser, steering in choosers:
            steering.ground = ground
            steering.begin(engine, chooser)
    return engine


def _chooser_of(compressor: Any) -> tuple[Chooser | None, Compressor | None]:
    """What was given, as either."""
    if isinstance(compressor, str) and compressor == "auto":
        return auto(), None
    return (compressor, None) if is_chooser(compressor) else (None, compressor)


def _check_equal(model: DDP) -> None:
    """Refuses replicas that differ. Collective.

    Raises:
        ValueError: names a parameter, and the first rank whose values of it are not rank 0's; on every rank.
    """
    names, params = _ddp.parameter_names(model), _ddp.reduced_parameters(model)

    def sums() -> dict[str, Any]:
        each = zip(params, _C.checksums(params), strict=True)
        return {f"the values of the parameter {names[param]}": total for param, total in each}

    agree(model.process_group, sums, "give every rank the same ones before dear.attach(), as building DDP does")
