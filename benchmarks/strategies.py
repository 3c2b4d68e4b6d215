"""The training strategies that are compared: each builds a model, an optimizer and the step a user would write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import spelling
from benchmarks.gpt import language_loss
from benchmarks.spelling import CompressorName
from benchmarks.workloads import repeated_blocks

ONE_BUCKET_MIB = 4096.0  # more than any model here: DDP then puts everything in one bucket
FORMS = (
    "none, ddp[:MIB], ddp+fp16[:MIB], ddp+powersgd[:RANK], fsdp2, dear[:sharded|replicated|auto[:MIB]], "
    f"COMPRESSOR[:MIB], dear+COMPRESSOR[:MIB], where COMPRESSOR is one of: {spelling.FORMS}"
)

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


class StrategyError(ValueError):
    """A strategy was named in a form that is not known; the message says which forms are."""


@dataclass
class Trainer:
    """A strategy built on this rank, ready to step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    engine: Any = None  # dear's Engine, where the strategy has one
    compressor: Any = None  # a compress.Compressor, where the strategy has one
    loss: Callable[[Any, Tensor], Tensor] = language_loss  # of the model's output and the targets

    @property
    def net(self) -> nn.Module:
        """The model without DDP around it."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One training step as a user writes it; returns this rank's loss."""
        loss = self.loss(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def synchronize(self) -> None:
        """Waits for what the last step left in flight."""
        if self.engine is not None:
            self.engine.synchronize()

    def stats(self) -> dict[str, Any]:
        """The engine's own account of its last step; empty for strategies that keep none."""
        return dict(self.engine.stats()) if self.engine is not None else {}

    def compressor_stats(self) -> dict[str, Any]:
        """The compressor's account of the last step, which must not be in flight any more; empty without one."""
        return dict(self.compressor.stats()) if self.compressor is not None else {}

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> float:
        """Loss on given examples, without training on them."""
        self.model.eval()
        loss = self.loss(self.model(inputs), targets).item()
        self.model.train()
        return loss

    def optimizer_state_bytes(self) -> int:
        """Bytes of tensor state the optimizer keeps on this rank, scalars such as Adam's step count included."""
        counted = self.stats().get("optimizer_state_bytes")  # the engine's: sharded state is not in the optimizer
        if counted is not None:
            return int(counted)
        return sum(_local_bytes(value) for state in self.optimizer.state.values() for value in state.values())

    def close(self) -> None:
        if self.engine is not None:
            self.engine.detach()


def _local_bytes(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    local = value.to_local() if hasattr(value, "to_local") else value  # FSDP2 keeps DTensors
    return local.numel() * local.element_size()


# By name: the class, the learning rate and the options.
OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], float, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, 0.02, {}),
    "momentum": (torch.optim.SGD, 0.05, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, 5e-4, {}),
}


def optimizer_factory(name: str, learning_rate: float | None = None) -> OptimizerFactory:
    """torch's own defaults (foreach included) for every strategy alike, so that none is handed a faster update.

    `name` is one of OPTIMIZERS; a learning rate of None takes the default there.
    """
    kind, default, options = OPTIMIZERS[name]
    chosen = default if learning_rate is None else learning_rate
    return lambda model: kind(model.parameters(), lr=chosen, **options)


@dataclass(frozen=True)
class Strategy:
    """What is compared. `name` is how the command line and the tables call it."""

    name: str
    bucket_cap_mb: float | None = None  # None: the rival's own default

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        raise NotImplementedError

    def payload_bytes(self, net: nn.Module, world: int) -> int:
        """Bytes one rank must send per step by the ring algorithm: 2 (P-1)/P of the gradients. Computed.

        Where there is a compressor, its own count of what it sends takes this number's place.
        """
        gradients = sum(p.numel() * p.element_size() for p in net.parameters())
        return 2 * (world - 1) * gradients // world


@dataclass
class InStep(Trainer):
    """Waits at the end of a step until every worker is there.

    Where workers share cores, one that ran ahead would time steps for which the others have paid.
    """

    group: dist.ProcessGroup | None = None

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        loss = super().step(inputs, targets)
        dist.barrier(self.group)
        return loss


class Floor(Strategy):
    """No gradient is exchanged: each rank trains alone, in step with the others. What every strategy would cost on an
    infinitely fast network."""

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        return InStep(net, optimizer(net), group=group)

    def payload_bytes(self, net: nn.Module, world: int) -> int:
        return 0


class DDP(Strategy):
    """torch's DistributedDataParallel as its own documentation tunes it: gradients as bucket views."""

    def wrap(self, net: nn.Module, group: dist.ProcessGroup) -> DistributedDataParallel:
        return DistributedDataParallel(
            net, process_group=group, bucket_cap_mb=self.bucket_cap_mb, gradient_as_bucket_view=True
        )

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        model = self.wrap(net, group)
        return Trainer(model, optimizer(model))


class DDPHalf(DDP):
    """DDP with torch's fp16 compression hook: half the bytes, the usual first thing to try on a slow network."""

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        model = self.wrap(net, group)
        model.register_comm_hook(group, fp16_compress_hook)
        return Trainer(model, optimizer(model))

    def payload_bytes(self, net: nn.Module, world: int) -> int:
        return super().payload_bytes(net, world) // 2


@dataclass(frozen=True)
class DDPPowerSGD(DDP):
    """DDP with torch's own PowerSGD hook, in one bucket: with several it hangs or aborts on gloo."""

    rank: int = 4

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        model = self.wrap(net, group)
        # 2 is the earliest start the hook allows together with error feedback.
        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=self.rank, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return Trainer(model, optimizer(model))

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

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        mesh = DeviceMesh.from_group(group, next(net.parameters()).device.type)
        for block in repeated_blocks(net):
            fully_shard(block, mesh=mesh, reshard_after_forward=False)
        fully_shard(net, mesh=mesh, reshard_after_forward=False)
        return Trainer(net, optimizer(net))


@dataclass(frozen=True)
class Dear(DDP):
    """This library on a DDP module; without a size, the library's default fusion size."""

    update: str = "auto"

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        import dear  # here, so that torch's strategies can be measured where the extension is not built

        model = DistributedDataParallel(net, process_group=group, gradient_as_bucket_view=True)
        own = optimizer(model)
        size: dict[str, Any] = {} if self.bucket_cap_mb is None else {"bucket_cap_mb": self.bucket_cap_mb}
        return Trainer(model, own, dear.attach(model, own, update=self.update, **size))


@dataclass(frozen=True, kw_only=True)
class Compressed(DDP):
    """DDP with a compressor of this library as its communication hook."""

    compressor: CompressorName

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        import compress

        model, compressor = self.wrap(net, group), self.compressor.make()
        compress.register(model, compressor)
        return Trainer(model, optimizer(model), compressor=compressor)


class DearCompressed(Compressed):
    """A compressor under the DeAR schedule: its second phase runs under the next forward pass."""

    def build(self, net: nn.Module, optimizer: OptimizerFactory, group: dist.ProcessGroup) -> Trainer:
        import dear

        model, compressor = self.wrap(net, group), self.compressor.make()
        own = optimizer(model)
        options: dict[str, Any] = {"compressor": compressor}
        if self.bucket_cap_mb is not None:
            options["bucket_cap_mb"] = self.bucket_cap_mb
        return Trainer(model, own, dear.attach(model, own, **options), compressor)


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
    kind, *rest = name.split(":")
    unknown = StrategyError(f"Strategy {name!r} is not known: the forms are {FORMS}.")
    plain: dict[str, Callable[..., Strategy]] = {"none": Floor, "fsdp2": FSDP2}
    sized: dict[str, Callable[..., Strategy]] = {"ddp": DDP, "ddp+fp16": DDPHalf}
    if kind in plain and not rest:
        return plain[kind](name)
    if kind == "ddp+powersgd" and (not rest or (len(rest) == 1 and spelling.whole(rest[0]))):
        return DDPPowerSGD(name, ONE_BUCKET_MIB, **({"rank": int(rest[0])} if rest else {}))
    if kind in sized and len(rest) <= 1:
        return sized[kind](name, _size(rest, unknown))
    if kind == "dear" and len(rest) <= 2:
        update = rest[0] if rest else "auto"
        if update in ("sharded", "replicated", "auto"):
            return Dear(name, _size(rest[1:], unknown), update=update)
    return _parse_compressed(name, unknown)


def _parse_compressed(name: str, unknown: StrategyError) -> Strategy:
    parts = name.removeprefix("dear+").split(":")
    if not spelling.is_compressor(parts[0]):
        raise unknown
    try:
        compressor, rest = spelling.split_name(parts)
    except ValueError:
        raise unknown from None
    if len(rest) > 1:
        raise unknown
    build = DearCompressed if name.startswith("dear+") else Compressed
    return build(name=name, bucket_cap_mb=_size(rest, unknown), compressor=compressor)


def _size(rest: list[str], unknown: StrategyError) -> float | None:
    if not rest:
        return None
    try:
        size = float(rest[0])
    except ValueError:
        raise unknown from None
    if not 0 < size < float("inf"):
        raise unknown
    return size


def is_dear(strategy: Strategy) -> bool:
    """Whether the strategy is this library's, so that its trainer has an engine to trace."""
    return isinstance(strategy, Dear | DearCompressed)


def trains_like(name: str, curves: Sequence[dict[str, Any]]) -> str | None:
    """Which of the strategies in the cells of benchmarks.convergence `name` trains like; None if none does.

    Itself, before all. Else the same without bucket size and schedule, which change no sum but its rounding (and, for
    top-k and sign, which elements share a threshold or a scale): dear:sharded:4 as ddp, dear+acp:8:2 as acp:8.
    """
    trained = {cell["plan"]["strategy"] for cell in curves}
    strategy = parse_strategy(name)
    plain: str | None = None
    if isinstance(strategy, Compressed):
        plain = str(strategy.compressor)
    elif type(strategy) in (DDP, Dear, FSDP2):
        plain = "ddp"
    elif isinstance(strategy, DDPHalf):
        plain = "ddp+fp16"
    return next((each for each in (name, plain) if each in trained), None)
