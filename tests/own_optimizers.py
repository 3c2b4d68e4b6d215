"""Optimizers as users write them: whose parameters are updated each on its own, and whose are not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn, optim
from torch.optim import _muon

Updates = Callable[["Written", dict[str, Any], list[nn.Parameter]], None]


class Written(optim.Optimizer):
    """One that gives the parameters of each group to a function, which updates them."""

    dear_whole = True

    def __init__(self, params: Any, updates: Updates, lr: float = 0.02) -> None:
        params = list(params)
        super().__init__(params, {"lr": lr})
        self.updates = updates
        self.numbers = {id(param): number for number, param in enumerate(params)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self.updates(self, group, [param for param in group["params"] if param.grad is not None])

    def kept(self, param: nn.Parameter, *names: str) -> list[torch.Tensor]:
        """Tensors of the parameter's shape in its state, zero at first; it counts its steps, too."""
        state = self.state[param]
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        return [state.setdefault(name, torch.zeros_like(param)) for name in names]


# --- each parameter on its own ---


def adam(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    """Asks tensors for numbers."""
    for param in params:
        first, second = opt.kept(param, "first", "second")
        first.lerp_(param.grad, 0.1)
        second.mul_(0.99).addcmul_(param.grad, param.grad, value=0.01)
        step = opt.state[param]["step"].item()
        param.addcdiv_(
            first, second.sqrt().div_((1 - 0.99**step) ** 0.5).add_(1e-8), value=-group["lr"] / (1 - 0.9**step)
        )


def lion_foreach(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    """All parameters in one call, none of which looks at another."""
    moments, grads = [opt.kept(param, "moment")[0] for param in params], [param.grad for param in params]
    updates = torch._foreach_lerp(moments, grads, 0.1)
    torch._foreach_sign_(updates)
    torch._foreach_mul_(params, 1 - 0.01 * group["lr"])
    torch._foreach_add_(params, updates, alpha=-group["lr"])
    torch._foreach_lerp_(moments, grads, 0.01)


def lars(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    """A ratio of norms for each parameter, asked of all at once; branches on numbers."""
    weights, grads = torch._foreach_norm(params), torch._foreach_norm([param.grad for param in params])
    for param, weight, grad in zip(params, weights, grads, strict=True):
        (moment,) = opt.kept(param, "moment")
        ratio = 0.02 * float(weight) / float(grad) if weight > 0 and grad > 0 else 1.0
        moment.mul_(0.9).add_(param.grad, alpha=ratio)
        param.sub_(moment, alpha=group["lr"])


def lamb(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    """Through ``.data``, as it was once written."""
    for param in params:
        first, second = opt.kept(param, "first", "second")
        first.mul_(0.9).add_(param.grad.data, alpha=0.1)
        second.mul_(0.99).addcmul_(param.grad.data, param.grad.data, value=0.01)
        update = first / (second.sqrt() + 1e-6) + 0.01 * param.data
        weight, norm = param.data.norm(), update.norm()
        ratio = torch.where(weight > 0, torch.where(norm > 0, weight / norm, 1.0), 1.0).clamp(max=10)
        param.data = param.data - group["lr"] * ratio * update


def adafactor(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    """Clips each update by its own size."""
    for param in params:
        state, square = opt.state[param], param.grad.square() + 1e-30
        if param.dim() == 2:
            if not state:
                state.update(rows=square.mean(1), columns=square.mean(0))
            state["rows"].lerp_(square.mean(1), 0.2)
            state["columns"].lerp_(square.mean(0), 0.2)
            second = torch.outer(state["rows"], state["columns"]) / state["rows"].mean()
        else:
            second = state["second"] = torch.lerp(state.get("second", square), square, 0.2)
        update = param.grad / second.sqrt()
        update /= max(1.0, update.square().mean().sqrt().item())
        param.add_(update, alpha=-group["lr"])


def soap(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    """Bases in lists, and Adam in them."""
    for param in params:
        state = opt.state[param]
        if not state:
            state.update(step=0, gg=[torch.zeros(size, size) for size in param.shape], bases=[], second=None)
        state["step"] += 1
        for axis, gg in enumerate(state["gg"]):
            other = [other for other in range(param.dim()) if other != axis]
            gg.lerp_(torch.tensordot(param.grad, param.grad, dims=(other, other)), 0.1)
        if state["step"] % 2 == 1:
            state["bases"] = [torch.linalg.eigh(gg)[1] for gg in state["gg"]]
        turned = param.grad
        for basis in state["bases"]:
            turned = torch.tensordot(turned, basis, dims=([0], [0]))
        second = state["second"] = torch.lerp(state["second"], turned**2, 0.1) if state["step"] > 1 else turned**2
        update = turned / (second.sqrt() + 1e-4)
        for basis in state["bases"]:
            update = torch.tensordot(update, basis, dims=([0], [1]))
        param.add_(update, alpha=-group["lr"])


def batched_muon(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    """Matrices of one shape in one batch, which kernels may round otherwise than one alone."""
    by_shape = defaultdict(list)
    for param in params:
        by_shape[param.shape if param.dim() == 2 else None].append(param)
    for shape, alike in by_shape.items():
        moments = [opt.kept(param, "moment")[0].lerp_(param.grad, 0.1) for param in alike]
        if shape is not None:
            batch = torch.stack(moments)
            batch = batch / batch.norm(dim=(1, 2), keepdim=True)
            for _ in range(3):
                batch = 1.5 * batch - 0.5 * torch.bmm(torch.bmm(batch, batch.mT), batch)
            moments = list(batch.unbind())
        for param, moment in zip(alike, moments, strict=True):
            param.add_(moment, alpha=-group["lr"])


def muon_in_bfloat16(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    for param in params:
        (moment,) = opt.kept(param, "moment")
        update = moment.lerp_(param.grad, 0.1)
        if param.dim() == 2:
            update = _muon._zeropower_via_newtonschulz(update, (3.4445, -4.7750, 2.0315), 5, 1e-7).to(param.dtype)
        param.add_(update, alpha=-group["lr"])


def by_attribute(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    """Knows a parameter by what was put on it."""
    for param in params:
        param.add_(param.grad, alpha=-group["lr"] * getattr(param, "scale", 1.0))


def by_identity(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    """Knows a parameter by what it is."""
    for param in params:
        param.add_(param.grad, alpha=-group["lr"] * (1 + opt.numbers[id(param)]))


def by_identity_if_known(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    for param in params:
        param.add_(param.grad, alpha=-group["lr"] * (1 + opt.numbers.get(id(param), -0.5)))


# --- parameters that depend on one another ---


def clips(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    nn.utils.clip_grad_norm_(params, 10.0)  # which is more than there is
    adam(opt, group, params)


def by_the_norm_of_all(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    total = sum(param.grad.square().sum().item() for param in params) ** 0.5
    for param in params:
        param.add_(param.grad, alpha=-group["lr"] / (1 + total))


def by_the_norm_of_matrices(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    total = torch.stack([param.grad.norm() for param in params if param.dim() == 2] or [torch.ones(())]).norm()
    for param in params:
        param.add_(param.grad / total if param.dim() == 2 else param.grad, alpha=-group["lr"])


def by_the_largest(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    largest = max(float(param.grad.abs().max()) for param in params)
    for param in params:
        if largest > 100:
            param.grad.div_(largest)
        adam(opt, group, [param])


def by_weights_of_all(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    size = torch.cat([param.flatten() for param in params]).norm()
    for param in params:
        param.add_(param.grad, alpha=-group["lr"] * float(size))


def by_number(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    for number, param in enumerate(params):
        param.add_(param.grad, alpha=-group["lr"] / (1 + number))


def by_how_many(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    for param in params:
        param.add_(param.grad, alpha=-group["lr"] / len(params))


def in_numpy(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    flat = nn.utils.parameters_to_vector([param.grad for param in params]).numpy()
    for param in params:
        param.add_(param.grad, alpha=-group["lr"] / float((flat**2).sum() ** 0.5))


def by_pairs(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    """Every second one is updated by the one before it."""
    for one, other in zip(params[::2], params[1::2], strict=True):
        one.add_(one.grad, alpha=-group["lr"] * float(other.norm()))
        other.add_(other.grad, alpha=-group["lr"])


def in_one_vector(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    """A direction of all gradients together, in the state of the first parameter."""
    flat = nn.utils.parameters_to_vector([param.grad for param in params])
    state, at = opt.state[params[0]], 0
    last = state.get("direction", torch.zeros_like(flat))
    state["direction"] = flat + last * (flat.norm() / (1 + last.norm())) if last.shape == flat.shape else flat
    for param in params:
        part = state["direction"][at : at + param.numel()]
        param.add_(part.view_as(param), alpha=-group["lr"])
        at += param.numel()


def later(opt: Written, group: dict[str, Any], params: list[nn.Parameter]) -> None:
    """It begins in the fourth step."""
    for param in params:
        opt.kept(param)
    if opt.state[params[0]]["step"] > 3:
        nn.utils.clip_grad_norm_(params, 0.01)
    for param in params:
        param.add_(param.grad, alpha=-group["lr"])


APART = (
    adam, lion_foreach, lars, lamb, adafactor, soap, batched_muon, muon_in_bfloat16, by_attribute, by_identity,
    by_identity_if_known,
)  # fmt: skip
JOINT = (
    clips, by_the_norm_of_all, by_the_norm_of_matrices, by_the_largest, by_weights_of_all, by_number, by_how_many,
    in_numpy, by_pairs, in_one_vector, later,
)  # fmt: skip
