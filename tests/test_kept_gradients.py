"""Gradients in shards that were changed and not zeroed, where the model's outputs do not tell of the next pass."""

import owning
import torch
from refusing import refused
from torch import nn, optim

import dear


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
