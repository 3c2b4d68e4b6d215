"""Eva, FOOF and Shampoo: on plain DDP and under the schedule the result is the golden model's."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from place import place
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dear
import precondition
from precondition.eva import Eva
from precondition.eva_reference import Reference
from precondition.foof import FOOF
from precondition.shampoo import Shampoo

OPTIONS = (
    {"damping": 0.03, "factor_decay": 0.05, "kl_clip": 0.001},
    {"damping": 0.3, "factor_decay": 0.9, "kl_clip": None},
)
KINDS = {"eva": Eva, "foof": FOOF, "shampoo": Shampoo}


class Net(nn.Module):
    """Strided, padded, dilated and grouped convolutions, linear layers of sequences and of rows, one left out."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 6, (1, 2), groups=2, bias=False, padding_mode="circular", padding=(0, 1))
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6, dilation=2, padding="same")
        self.positions = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.tanh(self.grouped(torch.tanh(self.images(x))))
        x = torch.tanh(self.depthwise(x.flatten(2))).transpose(1, 2)
        return self.out(self.norm(torch.tanh(self.positions(x))).mean(1))


def data(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(8, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randn(8, 3, generator=generator, dtype=torch.float64)


def build():
    torch.manual_seed(3)
    return Net().double()


def golden(kind, world, steps, options, split=1):
    """Parameters after some steps of SGD with momentum, all ranks' batches in one process."""
    net = build()
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    reference = Reference(kind, layers, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        for rank in range(world):
            x, y = data(rank, step)
            for piece, target in zip(x.chunk(split), y.chunk(split), strict=True):
                (F.mse_loss(net(piece), target) / world / split).backward()
            # The golden model's gradients are of the mean over ranks, a rank's own are of its own loss.
            for _, gradients in reference._seen.values():
                gradients[:] = [each * world for each in gradients]
            reference.next_rank()
        reference.step(0.05)
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach() for param in net.parameters()]


def train(rank, kind, options, attach, steps=4, split=1):
    """The same on every rank, by plain DDP, or by the schedule where ``attach`` is given."""
    net = build().to(place())
    model = DDP(net, bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    preconditioner = KINDS[kind](**options)
    engine = None
    if attach is None:
        precondition.register(model, optimizer, preconditioner)
    else:
        engine = dear.attach(model, optimizer, preconditioner=preconditioner, bucket_cap_mb=0.001, **attach)
    for step in range(steps):
        x, y = (each.to(place()) for each in data(rank, step))
        pieces = list(zip(x.chunk(split), y.chunk(split), strict=True))
        for index, (piece, target) in enumerate(pieces):
            with contextlib.nullcontext() if index + 1 == len(pieces) else model.no_sync():
                (F.mse_loss(model(piece), target) / split).backward()
        if engine is None:
            preconditioner.step()
        optimizer.step()
        optimizer.zero_grad()
    if engine is not None:
        engine.detach()
    return [param.detach().clone() for param in net.parameters()], preconditioner.state_dict()


def same(have, want):
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-8, atol=1e-10)


def as_golden(rank, world, kind, ways):
    for number, options in enumerate(OPTIONS):
        want = golden(kind, world, 4, options, split=1 + number)
        for attach in ways:
            same(train(rank, kind, options, attach, split=1 + number)[0], want)


WAYS = (None, {}, {"update": "owned"}, {"update": "sharded", "algorithm": "native"})
TWO_LEVELS = ({"hierarchy": 2}, {"hierarchy": 2, "algorithm": "native"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_golden_models_result(pool1, pool2, pool3, kind):
    pool1.run(as_golden, kind, (None, {}))
    pool2.run(as_golden, kind, WAYS)
    pool3.run(as_golden, kind, (None, {}))


@pytest.mark.parametrize("kind", KINDS)
def test_in_two_levels(pool4, kind):
    pool4.run(as_golden, kind, TWO_LEVELS)
