"""``dear.attach``: checks that the schedule can work here, and puts it to work."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import Optimizer

from dear import _ddp, _refusals, preconditioning
from dear._agree import agree, meet_on
from dear._assembly import STRATEGIES, Ground, Setting, choose_strategy, usual_cap
from dear._context import StepContext, ordinary
from dear._fusion import check_cap
from dear._look_again import overlapping
from dear._nodes import check_hierarchy, find_nodes
from dear._optimizer import UserOptimizer, unwrapped
from dear._options import options_of
from dear._replicas import check_equal, check_interval
from dear._replicated import ReplicatedUpdate
from dear._update import Request, Update
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
            with those of the other ranks, 8 bytes a parameter tensor and rank, the optimizers' options, and what was
            done to gradients in shards; where they differ, it raises RuntimeError on every rank, which names the ranks
            and a parameter. Sharded and owned updates compare parameters before that step's update, too. 0: never.
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
    _refusals.check_kind(model, "dear.attach()")
    optimizers = tuple(map(unwrapped, optimizer if isinstance(optimizer, (list, tuple)) else (optimizer,)))
    asked = _Asked(
        model, optimizers, compressor, preconditioner, update, bucket_cap_mb, overlap_forward, process_group, algorithm,
        check_replicas, hierarchy,
    )  # fmt: skip
    decided: _Decided | None = None

    def look() -> dict[str, Any]:
        nonlocal decided
        decided = asked.decide()
        return decided.facts

    meet_on(model.process_group, model.device)
    agree(model.process_group, look, "every rank must call dear.attach() with the same arguments")
    assert decided is not None
    ground, setting, steering = decided.ground, decided.setting, decided.steering
    ground = dataclasses.replace(ground, nodes=find_nodes(ground.group, hierarchy))
    with ordinary(StepContext(ground.device, grad=False)):
        # Each rank's part of the parameters is handed to all, or may be one day, and made with its part of the state.
        if steering is not None or setting.update != ReplicatedUpdate.kind:
            check_equal(model, optimizers, "give every rank the same before dear.attach()")
        engine = Engine(ground.assemble(setting), overlap_forward=overlap_forward, check_replicas=check_replicas)
        if steering is not None:
            steering.ground = ground
            steering.begin(engine)
    return engine


@dataclass(frozen=True)
class _Decided:
    """What one rank makes of its arguments."""

    ground: Ground
    setting: Setting  # to begin with
    steering: Steering | None  # where the setting is chosen while training goes on
    facts: dict[str, Any]  # what must be equal on every rank, by name


@dataclass(frozen=True)
class _Asked:
    """The arguments of :func:`attach`, on one rank."""

    model: DDP
    optimizers: tuple[Any, ...]
    compressor: Any
    preconditioner: preconditioning.Preconditioner | None
    update: str
    bucket_cap_mb: float | Literal["auto"]
    overlap_forward: bool
    process_group: dist.ProcessGroup | None
    algorithm: str | None
    check_replicas: int
    hierarchy: int | Literal["node"] | None

    def decide(self) -> _Decided:
        """Checks them, and changes nothing. Does not communicate.

        Raises:
            TypeError, ValueError, RuntimeError: one sentence says what is wrong and what to do.
        """
        model = self.model
        if not self.optimizers:
            raise ValueError("optimizer must be an optimizer or several, and an empty list was given.")
        _refusals.check(model, self.optimizers, self.process_group)
        check_hierarchy(self.hierarchy)
        chooser, compressor = self._chooser_or_compressor()
        group = self.process_group if self.process_group is not None else model.process_group
        device = _ddp.reduced_parameters(model)[0].device
        facts = self._facts_of_methods(chooser or compressor)
        strategy, cap = self._strategy(compressor, group.size())
        check_cap(cap)
        check_interval(self.check_replicas)
        ground = Ground(
            model, [UserOptimizer(each) for each in self.optimizers], group, device,
            choose_algorithm(group, device, self.algorithm), None, self.preconditioner,
        )  # fmt: skip
        setting = Setting(strategy.kind, cap, compressor)
        steering = None
        if chooser is not None:
            steering = Steering(ground, setting, chooser, update=self.update, tunes_cap=self.bucket_cap_mb == "auto")
            setting = steering.setting
            if setting.compressor is not None:
                setting.compressor.check_new(model, "dear.attach()")
        facts |= {
            "bucket_cap_mb": setting.bucket_cap_mb,
            "algorithm": ground.algorithm,
            "process_group": group.group_name,  # groups of the same ranks would wait for each other
            "update": setting.update,
            "optimizer": ", ".join(type(each).__name__ for each in self.optimizers),
            "overlap_forward": self.overlap_forward,
            "check_replicas": self.check_replicas,
            "hierarchy": self.hierarchy,
            **options_of(self.optimizers),  # behind their names: what differs in kind differs in options, too
        }
        return _Decided(ground, setting, steering, facts)

    def _chooser_or_compressor(self) -> tuple[Chooser | None, Compressor | None]:
        """What was given as compressor, as either."""
        chooses = self.compressor == "auto" if isinstance(self.compressor, str) else is_chooser(self.compressor)
        if not chooses:
            if self.compressor is not None:
                check_kind(self.compressor, "dear.attach()")
            return None, self.compressor
        return auto() if isinstance(self.compressor, str) else self.compressor, None

    def _facts_of_methods(self, chooser_or_compressor: Chooser | Compressor | None) -> dict[str, Any]:
        """What a compressor, or who chooses one, and a preconditioner say must be equal on every rank."""
        facts: dict[str, Any] = {"the compressor": None}
        if chooser_or_compressor is not None:
            facts = dict(chooser_or_compressor.check_new(self.model, "dear.attach()"))
        if self.preconditioner is not None:
            preconditioning.check_kind(self.preconditioner, "dear.attach()")
            preconditioning.check_free(self.model)
            facts |= self.preconditioner.check_new(self.model, self.optimizers, "dear.attach()")
        return facts

    def _strategy(self, compressor: Compressor | None, world: int) -> tuple[type[Update], float]:
        """Who updates what, and the MiB of a fusion group."""
        served: Sequence[str] = tuple(STRATEGIES)
        teams: Sequence[preconditioning.Team] = ()
        if self.preconditioner is not None:
            served, teams = self.preconditioner.updates, self.preconditioner.teams(self.model)
        shared = overlapping(_ddp.parameter_names(self.model))
        request = Request(self.optimizers, compressor is not None, shared, teams)
        strategy = choose_strategy(request, self.update, served)
        if self.bucket_cap_mb != "auto":
            return strategy, self.bucket_cap_mb
        ratio = 1.0 if compressor is None else compressor.usual_ratio
        return strategy, usual_cap(strategy, request, self.model, world, ratio)
