"""The parts of an engine, made of a setting: by ``attach``, and again where the setting changes at a step boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from dear import _C, _ddp, preconditioning
from dear._attached import AnyScheduler, Attached, weakly
from dear._bucket_order import BucketOrder
from dear._fusion import MIB
from dear._nodes import Nodes, make_lane_by_levels
from dear._optimizer import UserOptimizer
from dear._own_steps import has_own_step
from dear._owned import OwnedUpdate, is_known
from dear._pending import Barrier
from dear._plain import NoScheduler, PlainSchedule, PlainUpdate
from dear._replicated import ReplicatedUpdate
from dear._schedule import Schedule
from dear._sharded import ShardedUpdate
from dear._update import Request, Update
from dear.collectives import Algorithm, group_timeout, make_lane
from dear.compression import Compressor, Site, Uncompressed

REDUCES, GATHERS = "reduce-scatter", "all-gather"  # lanes

#: In the order in which ``update="auto"`` tries them.
STRATEGIES: dict[str, type[Update]] = {kind.kind: kind for kind in (ShardedUpdate, OwnedUpdate, ReplicatedUpdate)}


@dataclass(frozen=True)
class Setting:
    """How an engine trains: what may change at a step boundary. Equal on every rank.

    update: one of STRATEGIES, or ``"ddp"``: DistributedDataParallel itself reduces, and nothing is decoupled.
    bucket_cap_mb: of a fusion group, or of DDP's buckets.
    """

    update: str
    bucket_cap_mb: float
    compressor: Compressor | None = None


class Timetable(Protocol):
    """What the engine asks of a schedule; see :class:`dear._schedule.Schedule`."""

    watches_forward: bool  # whether it is to be told when a forward pass begins and ends
    bucket_order: BucketOrder
    group_bytes: int

    def look_again(self) -> None: ...

    def unclaimed(self) -> None: ...

    def before_forward(self) -> None: ...

    def after_forward(self, failed: bool) -> None: ...

    def release(self) -> None: ...

    def restore_reducer(self) -> bool: ...


@dataclass(frozen=True)
class Parts:
    """What an engine is made of."""

    attached: Attached
    schedule: Timetable
    update: Update


@dataclass(frozen=True, eq=False)
class Ground:
    """What an engine stands on, whatever its setting."""

    model: DDP
    users: Sequence[UserOptimizer]
    group: dist.ProcessGroup
    device: torch.device
    algorithm: Algorithm
    nodes: Nodes | None = None
    preconditioner: preconditioning.Preconditioner | None = None
    lanes: dict[str, _C.Lane] = field(default_factory=dict)  # by name: a setting takes those of the one before

    def assemble(self, setting: Setting) -> Parts:
        """Makes the parts; the model's communication hook is free. Collective."""
        # Compressors and preconditioners change the training of a single rank, too.
        alone = self.group.size() == 1 and setting.compressor is None and self.preconditioner is None
        leaves_ddp_alone = alone or setting.update == PlainUpdate.kind
        return self._plain(setting) if leaves_ddp_alone else self._scheduled(setting)

    def _plain(self, setting: Setting) -> Parts:
        attached = self._attached(setting, NoScheduler(), self._lane(GATHERS))
        update = PlainUpdate(attached)
        return Parts(attached, PlainSchedule(attached, update, setting.bucket_cap_mb), update)

    def _scheduled(self, setting: Setting) -> Parts:
        strategy = STRATEGIES[setting.update]
        gather_lane, reduce_lane = self._lane(GATHERS), self._lane(REDUCES)
        scheduler = _C.Scheduler(reduce_lane, gather_lane, strategy.gathers_gradients)
        attached = self._attached(setting, scheduler, gather_lane)
        optimizers = [user.optimizer for user in self.users]
        if setting.compressor is not None:
            lanes = [reduce_lane, gather_lane]
            wait = weakly(attached, Attached.synchronize)
            attached.compression = setting.compressor.bind_to_schedule(
                Site(self.model, optimizers[0], self.device, lanes, self.algorithm, scheduler, wait, self.nodes)
            )
        if self.preconditioner is not None:
            attached.preconditioning = self.preconditioner.bind_to_schedule(
                preconditioning.Site(
                    self.model.module, attached.params, optimizers, self.group, self.device, strategy.kind, reduce_lane,
                    gather_lane, self.algorithm,
                )
            )  # fmt: skip
        update = strategy(attached)
        attached.barrier.arrive, attached.barrier.finish = update.arrive, update.finish
        return Parts(attached, Schedule(attached, update, setting.bucket_cap_mb), update)

    def _attached(self, setting: Setting, scheduler: AnyScheduler, gather_lane: _C.Lane) -> Attached:
        return Attached(
            model=self.model,
            users=list(self.users),
            group=self.group,
            device=self.device,
            params=_ddp.reduced_parameters(self.model),
            names=_ddp.parameter_names(self.model),
            update=setting.update,
            scheduler=scheduler,
            gather_lane=gather_lane,
            barrier=Barrier(),
            compression=Uncompressed(),
        )

    def _lane(self, name: str) -> _C.Lane:
        """Collective where there is none yet."""
        if name not in self.lanes:
            timeout = group_timeout(self.group, self.device)
            self.lanes[name] = make_lane_by_levels(
                self.group, name, self.algorithm, timeout, self.nodes, reduces=name == REDUCES
            )
        return self.lanes[name]

    def lanes_by_phase(self, all_to_all: bool) -> dict[str, _C.Lane]:
        """Those of the dense phases, and, where it is asked for, one of all-to-alls for the caller. Collective."""
        found = {"reduce_scatter": self._lane(REDUCES), "all_gather": self._lane(GATHERS)}
        if all_to_all:
            timeout = group_timeout(self.group, self.device)
            found["all_to_all"] = make_lane(self.group, "probe", self.algorithm, timeout, all_to_all=True)
        return found

    def let_go_of_lanes(self, setting: Setting | None) -> None:
        """Of those that the setting does not use; of all where there is none."""
        used = [] if setting is None else [GATHERS] if setting.update == PlainUpdate.kind else [GATHERS, REDUCES]
        for name in self.lanes.keys() - used:
            del self.lanes[name]


def choose_strategy(request: Request, update: str, served: Sequence[str] = tuple(STRATEGIES)) -> type[Update]:
    """The strategy that ``update`` names, or the first one that can serve the request.

    served: the names of those that a preconditioner can work under, in the order in which they are tried.

    Raises:
        ValueError: an unknown name, or a strategy that cannot serve it.
    """
    if update == "auto":
        found = next((name for name in served if STRATEGIES[name].suits(request)), None)
        if found is None and ReplicatedUpdate.kind not in served and not request.compresses:
            what, remedy = _why_replicated(request, served)
            raise ValueError(
                f'update="auto" is "replicated" with {what}, and a preconditioner changes gradients where their owners '
                f"are: {remedy}leave preconditioner out of dear.attach(), call precondition.register(), and "
                "preconditioner.step() between backward() and optimizer.step()."
            )
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


def _why_replicated(request: Request, served: Sequence[str]) -> tuple[str, str]:
    """With what no strategy that has owners is chosen by itself, and what else may help, as parts of a sentence."""
    if request.shared is not None:
        first, second = request.shared
        return f"the parameters {first} and {second}, which share memory", "make them one parameter, or "
    optimizer = next((each for each in request.optimizers if not is_known(each)), request.optimizers[0])
    kind = type(optimizer).__name__
    what = f"{kind}, whose step() is not torch's own" if has_own_step(optimizer) else kind
    if OwnedUpdate.kind not in served or OwnedUpdate.refusal(request) is not None:
        return what, ""
    return what, 'use update="owned" if the optimizer updates each parameter on its own, or '


def usual_cap(strategy: type[Update], request: Request, model: DDP, world: int, ratio: float) -> float:
    """MiB of a fusion group where the user names none; ``ratio``: by how much a compressor shrinks gradients."""
    return strategy.usual_group_bytes(request, _ddp.reduced_parameters(model), world, ratio) / MIB
