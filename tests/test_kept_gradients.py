"""Gradients that were changed, or that somebody keeps, when the next pass begins."""

import owning
import pytest
import torch
from refusing import refused
from silence import WARM, check, silence
from torch import nn, optim

import dear

WHOLE = ("replicated", "compressed", "register")  # whose averages are whole


class Hidden:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Beside(nn.Module):
    """One output can be seen, and the loss is of the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 8)

    def forward(self, x):
        y = self.body(x)
        return y.sum(), Hidden(y)


def never_silent(rank, world, kind):
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Beside())
    optimizer = {"sgd": optim.SGD, "whole": owning.WholeAdamW}[kind](model.parameters(), lr=0.1)
    dear.attach(model, optimizer)
    for zeroed in (True, True, False):
        model(torch.ones(4, 16))[1].value.square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        if zeroed:
            optimizer.zero_grad()
    with refused(RuntimeError, "changed in place and not zeroed"):
        model(torch.ones(4, 16))[1].value.square().mean().backward()


def test_what_cannot_be_added_to_is_refused(pool2):
    for kind in ("sgd", "whole"):
        pool2.run(never_silent, kind, group_timeout=20.0)


KEPT = f"{WARM}\n\nforward(3).backward()\n\nkept = [p.grad for p in params]\n\n"
NOTED = "note(kept); note([p.grad for p in params])"
CASES = [
    *silence("added to behind a forward pass that had no backward pass",
             f"{KEPT}forward(4); inexact(); forward(5).backward()\n\n{NOTED}", WHOLE),
    *silence("added to", f"{KEPT}inexact(); forward(5).backward()\n\n{NOTED}", WHOLE),
    *silence("zeroed, and another", f"{KEPT}opt.zero_grad(); forward(4); forward(5).backward()\n\n{NOTED}", WHOLE),
    *silence("over detach", f"{KEPT}detach()\n\nfor p in params: p.grad.add_(1)\n\n{NOTED}", WHOLE),
    *silence("over detach, added to", f"{KEPT}detach()\n\ninexact(); forward(5).backward()\n\n{NOTED}", WHOLE),
]  # fmt: skip


@pytest.mark.parametrize(("case", "may_refuse"), CASES)
def test_a_gradient_that_is_kept_is_what_plain_ddp_leaves_there(pool2, case, may_refuse):
    check(pool2, case, may_refuse)
