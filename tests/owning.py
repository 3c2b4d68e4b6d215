"""Optimizers that update whole parameters, for tests of update="owned"."""

from __future__ import annotations

from typing import Any

import torch
from torch import optim
from torch.optim import _muon


class WholeAdamW(optim.AdamW):
    """AdamW that wants parameters whole, though it would not need them so."""

    dear_whole = True


class Factored(optim.Optimizer):
    """Keeps a [n, n] matrix and a number for each parameter, and nothing of its shape: as Shampoo and its like."""

    dear_whole = True

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = param.grad.reshape(param.shape[0], -1) if param.dim() else param.grad.view(1, 1)
                state = self.state[param]
                if not state:
                    state.update(left=torch.eye(len(grad), dtype=grad.dtype, device=grad.device), calls=0)
                state["left"].lerp_(grad @ grad.T, 0.1)
                state["calls"] += 1
                scale = 1 / (1 + state["left"].diagonal().sum() * state["calls"])
                param.sub_((state["left"] @ grad).view_as(param), alpha=group["lr"] * float(scale))
        return loss


class MuonWithAuxiliary(optim.Optimizer):
    """One object for everything: Muon for groups with ``use_muon``, sign descent with momentum for the others."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "use_muon": False})

    def dear_whole(self, group: dict[str, Any]) -> bool:
        """Vectors may be cut anywhere."""
        return bool(group["use_muon"])

    def dear_cost(self, param: torch.Tensor) -> float:
        """Any unit will do."""
        return float(min(param.shape) * param.numel())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param.grad)
                state["momentum"].lerp_(param.grad, 0.1)
                update = state["momentum"].sign()
                if group["use_muon"]:
                    update = _muon._zeropower_via_newtonschulz(state["momentum"], (3.4445, -4.7750, 2.0315), 5, 1e-7)
                param.add_(update, alpha=-group["lr"])


def muon_with_auxiliary(params: Any, **options: Any) -> optim.Optimizer:
    """Matrices by Muon and the rest otherwise, in one optimizer."""
    params = list(params)
    matrices = [param for param in params if param.dim() == 2]
    rest = [param for param in params if param.dim() != 2]
    return MuonWithAuxiliary([{"params": matrices, "use_muon": True}, {"params": rest}], **options)


class Several:
    """Several optimizers, stepped one after another as a user would."""

    def __init__(self, *optimizers: optim.Optimizer) -> None:
        self.optimizers = list(optimizers)

    def step(self, closure: Any = None) -> None:
        """One step of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of each."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def muon_and_adamw(params: Any, lr: float = 0.02) -> Several:
    """Matrices by torch's Muon and the rest by AdamW: what its documentation tells users to do."""
    params = list(params)
    matrices = [param for param in params if param.dim() == 2]
    rest = [param for param in params if param.dim() != 2]
    return Several(optim.Muon(matrices, lr=lr), optim.AdamW(rest, lr=lr / 4))
