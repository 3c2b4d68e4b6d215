"""Trains a model with plain DDP and with the engine from the same start, for tests to compare."""

from collections.abc import Callable
from typing import Any

import models
import torch
import torch.nn.functional as F
from place import place
from torch.nn.parallel import DistributedDataParallel as DDP

import dear

SMALL = {"bucket_cap_mb": 0.002}  # several fusion groups even in these models
SGD = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01})


def build(model: str, optimizer: tuple[Any, dict[str, Any]], ddp: dict[str, Any]) -> tuple[DDP, torch.optim.Optimizer]:
    """A DDP module and its optimizer, the same on every rank and every time."""
    torch.manual_seed(0)
    net = getattr(models, model)().to(place())
    wrapped = DDP(net, **ddp)
    kind, options = optimizer
    return wrapped, kind(net.parameters(), **options)


def model_for_sums() -> str:
    """For optimizers that sum over a parameter. A GPU adds in another order where an operand does not begin at a
    multiple of 16 bytes, so bits can be compared there only of a model whose parameters do."""
    return "Mlp" if place().type == "cpu" else "Aligned"


def loss_of(model: torch.nn.Module, rank: int, step: int) -> torch.Tensor:
    """The loss on this rank's data of this step."""
    x, y = (each.to(place()) for each in models.data(rank, step))
    return F.mse_loss(model(x), y)


def plain_step(model: DDP, optimizer: torch.optim.Optimizer, rank: int, step: int) -> float:
    """One ordinary training step."""
    loss = loss_of(model, rank, step)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


Step = Callable[[DDP, torch.optim.Optimizer, int, int], float]


def train(
    rank: int,
    model: str,
    optimizer: tuple[Any, dict[str, Any]] = SGD,
    ddp: dict[str, Any] | None = None,
    attach: dict[str, Any] | None = None,
    steps: int = 6,
    step: Step = plain_step,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final parameters of ``steps`` steps; with the engine if ``attach`` is given."""
    wrapped, opt = build(model, optimizer, ddp or {})
    engine = dear.attach(wrapped, opt, **attach) if attach is not None else None
    losses = [step(wrapped, opt, rank, index) for index in range(steps)]
    state = {name: value.clone() for name, value in wrapped.module.state_dict().items()}
    if engine is not None:
        engine.detach()
    return losses, state


def compare(rank: int, world: int, *args: Any, exact: bool = True, attach: dict[str, Any], **options: Any) -> None:
    """Plain DDP and the engine must give the same losses and parameters: bit for bit, or to rounding."""
    want_losses, want = train(rank, *args, **options)
    losses, have = train(rank, *args, attach=attach, **options)
    for name, value in want.items():
        if exact:
            assert torch.equal(have[name], value), f"{name} differs by {(have[name] - value).abs().max()}"
        else:
            torch.testing.assert_close(have[name], value)
    if exact:
        assert losses == want_losses, (losses, want_losses)
