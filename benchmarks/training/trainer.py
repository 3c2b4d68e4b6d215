"""What every strategy is once it is built: a model, an optimizer and the step a user would write."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .gpt import language_loss
from .muon import Together, muon_and_adamw

Optimizers = torch.optim.Optimizer | Together
OptimizerFactory = Callable[[nn.Module], Optimizers]


def listed(optimizers: Optimizers) -> list[torch.optim.Optimizer]:
    """The optimizers themselves, one or several."""
    return optimizers.optimizers if isinstance(optimizers, Together) else [optimizers]


@dataclass
class Trainer:
    """A strategy built on this rank, ready to step."""

    model: nn.Module
    optimizer: Optimizers
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

    @property
    def plan(self) -> dict[str, Any] | None:
        """What the engine has chosen by itself."""
        return self.engine.plan if self.engine is not None else None

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

    @torch.no_grad()
    def accuracy(self, inputs: Tensor, targets: Tensor) -> float:
        """The share of the targets that a model which chooses among classes chooses first."""
        self.model.eval()
        output = self.model(inputs)
        self.model.train()
        chosen = getattr(output, "logits", output).argmax(dim=-1)
        return (chosen == targets).float().mean().item()

    def optimizer_state_bytes(self) -> int:
        """Bytes of tensor state the optimizer keeps on this rank, scalars such as Adam's step count included."""
        counted = self.stats().get("optimizer_state_bytes")  # the engine's: sharded state is not in the optimizer
        if counted is not None:
            return int(counted)
        return sum(_local_bytes(value) for state in self.optimizer.state.values() for value in state.values())

    def close(self) -> None:
        if self.engine is not None:
            self.engine.detach()


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


def _local_bytes(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    local = value.to_local() if hasattr(value, "to_local") else value  # FSDP2 keeps DTensors
    return local.numel() * local.element_size()


def _of_all(kind: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[..., Optimizers]:
    return lambda model, lr: kind(model.parameters(), lr=lr, **options)


# By name: what makes it, of a model and a learning rate, and the rate.
OPTIMIZERS: dict[str, tuple[Callable[..., Optimizers], float]] = {
    "sgd": (_of_all(torch.optim.SGD), 0.02),
    "momentum": (_of_all(torch.optim.SGD, momentum=0.9), 0.05),
    "adamw": (_of_all(torch.optim.AdamW), 5e-4),
    "muon": (muon_and_adamw, 0.02),
}


def optimizer_factory(name: str, learning_rate: float | None = None) -> OptimizerFactory:
    """torch's own defaults (foreach included) for every strategy alike, so that none is handed a faster update.

    `name` is one of OPTIMIZERS; a learning rate of None takes the default there.
    """
    make, default = OPTIMIZERS[name]
    chosen = default if learning_rate is None else learning_rate
    return lambda model: make(model, chosen)
