"""Trains a model by the golden models of K-FAC and DP-KFAC, all ranks' parts in one process, for tests to compare."""

from __future__ import annotations

from typing import Any

import models
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precondition import reference


class Layers(nn.Module):
    """One of each kind: strided, padded, grouped, dilated, without bias, and embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=(2, 1), padding=1)
        self.grouped = nn.Conv2d(4, 6, (1, 2), groups=2, dilation=(1, 2))
        self.line = nn.Conv1d(6, 5, 2)
        self.norm = nn.LayerNorm(15)
        self.wide = nn.Linear(15, 10, bias=False)
        self.twice = nn.Linear(10, 10)
        self.words = nn.Embedding(5, 5, padding_idx=1)
        self.last = nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        words = self.words(x[:, :2].nan_to_num().abs().mul(2).clamp(max=4).long()).flatten(1)
        x = torch.tanh(self.grouped(torch.tanh(self.first(x.view(-1, 1, 4, 4)))))
        x = torch.tanh(self.wide(self.norm(self.line(x.flatten(2)).flatten(1))))
        return self.last(torch.relu_(self.twice(x)) + words)


def batch(rank: int, step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a rank's step."""
    x, y = models.data(rank, step)
    return x.to(dtype), y.to(dtype)


def build(seed: int = 0) -> Layers:
    """The model, the same every time."""
    torch.manual_seed(seed)
    return Layers().double()


def layers_of(net: nn.Module) -> dict[str, Any]:
    return {
        name: m for name, m in net.named_modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding))
    }


def backward(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Adds to ``.grad``; returns each layer's input and the gradient of its output."""
    inputs: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Tensor) -> None:
            inputs[name] = args[0].detach()
            output.register_hook(lambda grad: grads.update({name: grad}))

        return after

    handles = [module.register_forward_hook(watch(name)) for name, module in layers_of(net).items()]
    F.mse_loss(net(x), y).backward()
    for handle in handles:
        handle.remove()
    return {name: (inputs[name], grads[name]) for name in inputs}


def parts(module: Any) -> list[tuple[Any, slice, slice]]:
    """A grouped convolution as plain ones: each with its input and its output channels."""
    groups = getattr(module, "groups", 1)
    if groups == 1:
        return [(module, slice(None), slice(None))]
    ins, outs = module.in_channels // groups, module.out_channels // groups
    one = nn.Conv2d(ins, outs, module.kernel_size, module.stride, module.padding, module.dilation).double()
    return [(one, slice(i * ins, (i + 1) * ins), slice(i * outs, (i + 1) * outs)) for i in range(groups)]


def matrix(module: Any, outs: slice) -> Tensor:
    """The averaged gradient of a part, [out, in + 1]."""
    if isinstance(module, nn.Embedding):
        return module.weight.grad.t()
    weight = module.weight.grad[outs].flatten(1)
    return weight if module.bias is None else torch.cat([weight, module.bias.grad[outs][:, None]], 1)


@torch.no_grad()
def write(module: Any, outs: slice, value: Tensor) -> None:
    if isinstance(module, nn.Embedding):
        module.weight.grad.copy_(value.t())
        return
    weight = module.weight.grad[outs]
    weight.copy_((value if module.bias is None else value[:, :-1]).reshape(weight.shape))
    if module.bias is not None:
        module.bias.grad[outs] = value[:, -1]


class Golden:
    """A step of K-FAC (``owner`` is None: factors of all ranks) or of DP-KFAC (the owner's), as the papers have it."""

    def __init__(self, world: int, owner: dict[str, int] | None, **options: Any) -> None:
        self.world, self.owner, self.options = world, owner, options
        self.running: dict[tuple[str, int], list[Tensor]] = {}
        self.solved: dict[tuple[str, int], list[Tensor]] = {}
        self.steps = 0

    def train(self, net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        seen = []
        net.zero_grad()
        for rank in range(self.world):
            seen.append(backward(net, *batch(rank, step)))
        for param in net.parameters():
            param.grad /= self.world
        self.precondition(net, seen, optimizer.param_groups[0]["lr"])
        optimizer.step()

    def precondition(self, net: nn.Module, seen: list[dict[str, tuple[Tensor, Tensor]]], lr: float) -> None:
        options, pairs = self.options, []
        solve = {"cholesky": reference.precondition_cholesky, "eigen": reference.precondition_eigen}
        for name, module in layers_of(net).items():
            ranks = range(self.world) if self.owner is None else [self.owner[name]]
            for index, (part, ins, outs) in enumerate(parts(module)):
                key = (name, index)
                if self.steps % options["update_every"] == 0:
                    each = [
                        reference.factors(part, x[:, ins] if x.dim() > 2 else x, g[:, outs])
                        for x, g in (seen[rank][name] for rank in ranks)
                    ]
                    new = [torch.stack(factor).mean(0) for factor in zip(*each, strict=True)]
                    old = self.running.get(key, [None, None])
                    decay = options["factor_decay"]
                    self.running[key] = [reference.running(o, n, decay) for o, n in zip(old, new, strict=True)]
                if self.steps % options["inverse_every"] == 0:
                    self.solved[key] = self.running[key]
                grad = matrix(module, outs)
                done = solve[options["solver"]](grad, *self.solved[key], options["damping"])
                pairs.append((module, outs, grad, done))
        scale = torch.ones(())
        if options["kl_clip"] is not None:
            scale = reference.kl_scale([(done, grad, lr) for _, _, grad, done in pairs], options["kl_clip"])
        for module, outs, _, done in pairs:
            write(module, outs, done * scale)
        self.steps += 1
