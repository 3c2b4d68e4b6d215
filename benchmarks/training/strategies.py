"""The training strategies that are compared: each builds a model, an optimizer and the step a user would write.

A new one is a class and an entry in KINDS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from .. import spelling, tried
from ..spelling import CompressorName
from ..stats import FLOOR
from .trainer import InStep, OptimizerFactory, Trainer, listed
from .workloads import repeated_blocks

ONE_BUCKET_MIB = 4096.0  # more than any model here: DDP then puts everything in one bucket
FORMS = (
    "none, ddp[:MIB], ddp+fp16[:MIB], ddp+powersgd[:RANK], fsdp2, fsdp2+bf16, "
    "dear[:sharded|owned|replicated|auto[:MIB]], auto, planned:sharded|owned|replicated|ddp:MIB, COMPRESSOR[:MIB], "
    "dear+COMPRESSOR[:MIB], "
    f"{tried.FORMS}; COMPRESSOR is one "
    f"of: {spelling.FORMS}; @node behind dear or a compressor: in two levels, inside nodes and between them, and "
    "@RANKS says how many ranks a node has"
)


class StrategyError(ValueError):
    """A strategy was named in a form that is not known; the message says which forms are."""


Option = tuple[str, Callable[[str], Any]]
Hierarchy = int | Literal["node"] | None  # as dear.attach takes it


def _read(kind: Callable[[str], Any], accepts: Callable[[Any], bool]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if not accepts(found := kind(text)):
            raise ValueError(text)
        return found

    return read


SIZE: Option = ("bucket_cap_mb", _read(float, lambda mib: 0 < mib < float("inf")))
RANK: Option = ("rank", _read(int, lambda rank: 1 <= rank <= 256))
HIERARCHY = _read(lambda text: text if text == "node" else int(text), lambda found: found == "node" or found > 0)
UPDATE: Option = ("update", _read(str, ("sharded", "owned", "replicated", "auto").__contains__))

PLANNED: Option = ("update", _read(str, ("sharded", "owned", "replicated", "ddp").__contains__))


@dataclass(frozen=True)
class Strategy:
    """What is compared. `name` is how the command line and the tables call it."""

    name: str
    bucket_cap_mb: float | None = None  # None: the rival's own default

    #: What may follow the kind in a name, in this order: a field, and what reads it or raises ValueError.
    options: ClassVar[tuple[Option, ...]] = ()
    #: The plain strategy that trains the same: it changes no sum but its rounding. None: no other does.
    same_as: ClassVar[str | None] = None
    #: Whether it can move in two levels: then it has a field `hierarchy`.
    has_levels: ClassVar[bool] = False
    #: Steps that it needs before it is what it will be: behind its first ones, and of no round.
    settles: ClassVar[int] = 0

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        raise NotImplementedError

    def size(self) -> dict[str, Any]:
        """The fusion size as dear.attach takes it: nothing for its own default."""
        return {} if self.bucket_cap_mb is None else {"bucket_cap_mb": self.bucket_cap_mb}

    def payload_bytes(self, net: nn.Module, world: int) -> int:
        """Bytes one rank must send per step by the ring algorithm: 2 (P-1)/P of the gradients. Computed.

        Where there is a compressor, its own count of what it sends takes this number's place.
        """
        gradients = sum(p.numel() * p.element_size() for p in net.parameters())
        return 2 * (world - 1) * gradients // world


class Floor(Strategy):
    """No gradient is exchanged: each rank trains alone, in step with the others. What every strategy would cost on an
    infinitely fast network."""

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        return InStep(net, optimizer(net), group=group)

    def payload_bytes(self, net: nn.Module, world: int) -> int:
        return 0


class DDP(Strategy):
    """torch's DistributedDataParallel as its own documentation tunes it: gradients as bucket views."""

    options: ClassVar[tuple[Option, ...]] = (SIZE,)
    same_as: ClassVar[str | None] = "ddp"

    def wrap(self, net: nn.Module, group: dist.ProcessGroup) -> DistributedDataParallel:
        return DistributedDataParallel(
            net, process_group=group, bucket_cap_mb=self.bucket_cap_mb, gradient_as_bucket_view=True
        )

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        model = self.wrap(net, group)
        compressor = self.hook(model, group)
        return Trainer(model, optimizer(model), compressor=compressor)

    def hook(self, model: DistributedDataParallel, group: dist.ProcessGroup) -> Any:
        """Registers a communication hook; returns its compressor, where that can tell what it sends."""


class DDPHalf(DDP):
    """DDP with torch's fp16 compression hook: half the bytes, the usual first thing to try on a slow network."""

    same_as = "ddp+fp16"

    def hook(self, model: DistributedDataParallel, group: dist.ProcessGroup) -> None:
        model.register_comm_hook(group, default_hooks.fp16_compress_hook)

    def payload_bytes(self, net: nn.Module, world: int) -> int:
        return super().payload_bytes(net, world) // 2


@dataclass(frozen=True)
class DDPPowerSGD(DDP):
    """DDP with torch's own PowerSGD hook, in one bucket: with several it hangs or aborts on gloo."""

    options = (RANK,)
    same_as = None

    bucket_cap_mb: float | None = ONE_BUCKET_MIB
    rank: int = 4

    def hook(self, model: DistributedDataParallel, group: dist.ProcessGroup) -> None:
        # 2 is the earliest start the hook allows together with error feedback.
        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=self.rank, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    def payload_bytes(self, net: nn.Module, world: int) -> int:
        sent = 0
        for parameter in net.parameters():
            rows, columns = parameter.shape[0], parameter.numel() // parameter.shape[0]
            low_rank = (rows + columns) * min(self.rank, rows, columns)
            # The hook leaves a tensor dense unless that at least halves it.
            sent += (low_rank if 2 * low_rank < parameter.numel() else parameter.numel()) * parameter.element_size()
        return 2 * (world - 1) * sent // world


class FSDP2(Strategy):
    """fully_shard per block and at the root; parameters stay gathered after forward (ZeRO-2 traffic)."""

    same_as: ClassVar[str | None] = "ddp"
    reduce_dtype: ClassVar[torch.dtype | None] = None

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = DeviceMesh.from_group(group, next(net.parameters()).device.type)
        policy = MixedPrecisionPolicy(reduce_dtype=self.reduce_dtype)
        for module in (*repeated_blocks(net), net):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        return Trainer(net, optimizer(net))


class FSDP2Half(FSDP2):
    """FSDP2 that reduces gradients in bfloat16, computes in float32, and gathers parameters in float32."""

    same_as = None
    reduce_dtype = torch.bfloat16

    def payload_bytes(self, net: nn.Module, world: int) -> int:
        return super().payload_bytes(net, world) * 3 // 4


@dataclass(frozen=True)
class Dear(DDP):
    """This library on a DDP module; without a size, the library's default fusion size."""

    options = (UPDATE, SIZE)
    has_levels = True

    update: str = "auto"
    hierarchy: Hierarchy = None

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        import dear  # here, so that torch's strategies can be measured where the extension is not built

        model = DistributedDataParallel(net, process_group=group, gradient_as_bucket_view=True)
        own = optimizer(model)
        engine = dear.attach(model, listed(own), update=self.update, hierarchy=self.hierarchy, **self.size())
        return Trainer(model, own, engine)


class Auto(DDP):
    """What this library chooses by itself among exact methods, in 60 steps at most, which are not measured."""

    options: ClassVar[tuple[Option, ...]] = ()
    settles: ClassVar[int] = 62

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        import dear

        model = DistributedDataParallel(net, process_group=group, gradient_as_bucket_view=True)
        own = optimizer(model)
        return Trainer(model, own, dear.attach(model, listed(own), compressor="auto"))


@dataclass(frozen=True)
class Planned(DDP):
    """What ``auto`` is once it has chosen: begun with that choice as a plan, it only watches. Beside the same setting
    by hand it shows what watching costs."""

    options = (PLANNED, SIZE)

    update: str = "sharded"

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        import compress
        import dear

        model = DistributedDataParallel(net, process_group=group, gradient_as_bucket_view=True)
        own, elements = optimizer(model), sum(p.numel() for p in net.parameters() if p.requires_grad)
        plan = {
            "version": 1, "update": self.update, "compressor": None, "bucket_cap_mb": self.bucket_cap_mb or 1.0,
            "seconds": 0.0, "workers": group.size(), "elements": elements,
        }  # fmt: skip
        engine = dear.attach(model, listed(own), compressor=compress.auto(plan=plan))
        if engine.plan != plan:
            raise ValueError(f"{self.name} cannot be followed here: the log says why.")
        return Trainer(model, own, engine)


@dataclass(frozen=True, kw_only=True)
class Compressed(DDP):
    """DDP with a compressor of this library as its communication hook."""

    has_levels = True

    compressor: CompressorName
    hierarchy: Hierarchy = None

    def hook(self, model: DistributedDataParallel, group: dist.ProcessGroup) -> Any:
        import compress

        compressor = self.compressor.make()
        compress.register(model, compressor, hierarchy=self.hierarchy)
        return compressor


class DearCompressed(Compressed):
    """A compressor under the DeAR schedule: its second phase runs under the next forward pass."""

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        import dear

        model, compressor = self.wrap(net, group), self.compressor.make()
        own = optimizer(model)
        engine = dear.attach(model, listed(own), compressor=compressor, hierarchy=self.hierarchy, **self.size())
        return Trainer(model, own, engine, compressor)


@dataclass(frozen=True, kw_only=True)
class Tried(DDP):
    """DDP with a method that was tried for its loss and is not offered, in one bucket."""

    options: ClassVar[tuple[Option, ...]] = ()
    same_as = None

    bucket_cap_mb: float | None = ONE_BUCKET_MIB
    method: tried.Name

    def hook(self, model: DistributedDataParallel, group: dist.ProcessGroup) -> Any:
        from ..tried.hook import Hook

        hook = Hook(self.method, group)
        model.register_comm_hook(hook, Hook.of_bucket)
        return hook


# By the first word of a name. Compressors, which have a word each, are in spelling.py.
KINDS: dict[str, type[Strategy]] = {
    FLOOR: Floor,
    "ddp": DDP,
    "ddp+fp16": DDPHalf,
    "ddp+powersgd": DDPPowerSGD,
    "fsdp2": FSDP2,
    "fsdp2+bf16": FSDP2Half,
    "dear": Dear,
    "auto": Auto,
    "planned": Planned,
}


def parse_strategies(text: str) -> list[Strategy]:
    """A comma-separated list of the FORMS, each at most once."""
    found = [parse_strategy(name.strip()) for name in text.split(",") if name.strip()]
    names = [strategy.name for strategy in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not found:
        problem = f"Strategy {twice!r} is named twice" if twice else "No strategy is named"
        raise StrategyError(f"{problem}: give a list such as none,ddp:1,dear:sharded:1.")
    return found


def parse_strategy(name: str) -> Strategy:
    """The strategy of that name. Raises StrategyError."""
    one_level, in_levels, hierarchy = name.partition("@")
    kind, *words = one_level.split(":")
    try:
        fixed: dict[str, Any] = {}
        if kind in KINDS:
            build = KINDS[kind]
        elif kind == "tried":
            build, fixed["method"], words = Tried, tried.Name.read(words), []
        else:
            fixed["compressor"], words = spelling.split_name([kind.removeprefix("dear+"), *words])
            build = DearCompressed if kind.startswith("dear+") else Compressed
        options = build.options
        if in_levels:
            if not build.has_levels:
                raise ValueError("it has one level alone")
            fixed["hierarchy"] = HIERARCHY(hierarchy)
        if len(words) > len(options):
            raise ValueError("too many options")
        return build(
            name=name, **fixed, **{field: read(word) for (field, read), word in zip(options, words, strict=False)}
        )
    except (KeyError, ValueError):
        raise StrategyError(f"Strategy {name!r} is not known: the forms are {FORMS}.") from None
