"""``dear.attach``: checks that the schedule can work here, and puts it to work."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _C, _ddp, preconditioning
from dear._agree import agree
from dear._attached import Attached, weakly
from dear._context import StepContext, ordinary
from dear._fusion import MIB, check_cap
from dear._look_again import overlapping
from dear._nodes import Nodes, check_hierarchy, find_nodes, make_levelled_lane
from dear._optimizer import UserOptimizer, unwrapped
from dear._owned import OwnedUpdate
from dear._pending import Barrier
from dear._replicas import check_interval
from dear._replicated import ReplicatedUpdate
from dear._schedule import Schedule
from dear._sharded import ShardedUpdate
from dear._update import Request, Update
from dear.collectives import Algorithm, choose_algorithm, group_timeout
from dear.compression import Compressor, Site, Uncompressed, check_kind
from dear.engine import Engine

#: In the order in which ``update="auto"`` tries them.
STRATEGIES: dict[str, type[Update]] = {kind.kind: kind for kind in (ShardedUpdate, OwnedUpdate, ReplicatedUpdate)}


@dataclass(frozen=True)
class _Plan:
    """What was decided, equal on every rank."""

    strategy: type[Update]
    bucket_cap_mb: float
    algorithm: Algorithm
    device: torch.device


def attach(
    model: DDP,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    compressor: Compressor | None = None,
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
    plans: list[_Plan] = []
    optimizers = tuple(map(unwrapped, optimizer if isinstance(optimizer, (list, tuple)) else (optimizer,)))

    def look() -> dict[str, Any]:
        if not optimizers:
            raise ValueError("optimizer must be an optimizer or several, and an empty list was given.")
        _ddp.check(model, optimizers, process_group)
        check_hierarchy(hierarchy)
        known: dict[str, Any] = {"the compressor": None}
        if compressor is not None:
            check_kind(compressor, "dear.attach()")
            known = compressor.check_new(model, "dear.attach()")
        teams: Sequence[preconditioning.Team] = ()
        served: Sequence[str] = tuple(STRATEGIES)
        if preconditioner is not None:
            preconditioning.check_kind(preconditioner, "dear.attach()")
            known |= preconditioner.check_new(model, optimizers, "dear.attach()")
            served, teams = preconditioner.updates, preconditioner.teams(model)
        request = Request(optimizers, compressor is not None, overlapping(_ddp.parameter_names(model)), teams)
        strategy = choose_strategy(request, update, served)
        cap = bucket_cap_mb
        params = _ddp.reduced_parameters(model)
        if cap == "auto":
            ratio = 1.0 if compressor is None else compressor.usual_ratio
            cap = strategy.usual_group_bytes(request, params, group.size(), ratio) / MIB
        check_cap(cap)
        check_interval(check_replicas)
        device = params[0].device
        plan = _Plan(strategy, cap, choose_algorithm(group, device, algorithm), device)
        plans.append(plan)
        known |= dataclasses.asdict(plan) | {"update": strategy.kind}
        del known["strategy"], known["device"]
        return known | {
            "optimizer": ", ".join(type(each).__name__ for each in optimizers),
            "overlap_forward": overlap_forward,
            "check_replicas": check_replicas,
            "hierarchy": hierarchy,
        }

    agree(model.process_group, look, "every rank must call dear.attach() with the same arguments")
    nodes = find_nodes(group, hierarchy)
    with ordinary(StepContext(plans[0].device, grad=False)):
        if not plans[0].strategy.gathers_gradients:  # it hands each rank's part of the parameters to all
            _check_equal(model)
        return _assemble(
            model, optimizers, group, compressor, preconditioner, plans[0], nodes, overlap_forward, check_replicas
        )


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


def choose_strategy(request: Request, update: str, served: Sequence[str] = tuple(STRATEGIES)) -> type[Update]:
    """The strategy that ``update`` names, or the first one that can serve the request.

    served: the names of those that a preconditioner can work under, in the order in which they are tried.

    Raises:
        ValueError: an unknown name, or a strategy that cannot serve it.
    """
    if update == "auto":
        found = next((name for name in served if STRATEGIES[name].suits(request)), None)
        update = found if found is not None else ReplicatedUpdate.kind
    if update not in STRATEGIES:
        names = ", ".join(f'"{name}"' for name in STRATEGIES)
        raise ValueError(f'update must be "auto" or one of {names}, not {update!r}.')
    if update not in served:
        raise ValueError(
            f'A preconditioner changes gradients where their owners are, and update="{update}" has none, nor has a '
            "compressor: leave both out, or leave preconditioner out of dear.attach(), call precondition.register(), "
            "and preconditioner.step() between backward() and optimizer.step()."
        )
    refusal = STRATEGIES[update].refusal(request)
    if refusal is not None:
        raise ValueError(refusal)
    return STRATEGIES[update]


def _assemble(
    model: DDP,
    optimizers: Sequence[Optimizer],
    group: dist.ProcessGroup,
    compressor: Compressor | None,
    preconditioner: preconditioning.Preconditioner | None,
    plan: _Plan,
    nodes: Nodes | None,
    overlap_forward: bool,
    check_replicas: int,
) -> Engine:
    """Makes the parts. Collective."""
    timeout = group_timeout(group, plan.device)
    gather_lane = make_levelled_lane(group, "all-gather", plan.algorithm, timeout, nodes)
    reduce_lane = make_levelled_lane(group, "reduce-scatter", plan.algorithm, timeout, nodes)
    scheduler = _C.Scheduler(reduce_lane, gather_lane, plan.strategy.gathers_gradients)
    attached = Attached(
        model=model,
        users=[UserOptimizer(optimizer) for optimizer in optimizers],
        group=group,
        device=plan.device,
        params=_ddp.reduced_parameters(model),
        names=_ddp.parameter_names(model),
        scheduler=scheduler,
        gather_lane=gather_lane,
        barrier=Barrier(),
        compression=Uncompressed(),
    )
    if compressor is not None:
        lanes = [reduce_lane, gather_lane]
        wait = weakly(attached, Attached.synchronize)
        attached.compression = compressor.bind_to_schedule(
            Site(model, optimizers[0], plan.device, lanes, plan.algorithm, scheduler, wait, nodes)
        )
    if preconditioner is not None:
        attached.preconditioning = preconditioner.bind_to_schedule(
            preconditioning.Site(
                model.module, attached.params, optimizers, group, plan.device, plan.strategy.kind, reduce_lane,
                gather_lane,
            )
        )  # fmt: skip
    update = plan.strategy(attached)
    attached.barrier.finish = update.finish
    schedule = Schedule(attached, update, plan.bucket_cap_mb)
    return Engine(attached, schedule, update, overlap_forward=overlap_forward, check_replicas=check_replicas)
