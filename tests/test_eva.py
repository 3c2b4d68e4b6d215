"""Eva, FOOF and Shampoo: on plain DDP and under the schedule the result is the golden model's."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dear.collectives import make_lane
from dear.preconditioning import Piece, Site
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


def alone(rank, world, kind, options):
    """Without DDP: one rank."""
    net = build()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    lane = make_lane(dist.group.WORLD, "test", "ring", dist.distributed_c10d.default_pg_timeout)
    params = list(net.parameters())
    site = Site(net, params, [optimizer], dist.group.WORLD, params[0].device, "plain", lane, lane)
    binding = KINDS[kind](**options).bind_to_schedule(site)
    for step in range(4):
        x, y = data(rank, step)
        F.mse_loss(net(x), y).backward()
        binding.backward_ended()
        with torch.no_grad():
            binding.begin()
            binding.precondition([Piece(p, 0, p.numel(), p.grad) for p in params])
            binding.end()
        optimizer.step()
        optimizer.zero_grad()
    for have, want in zip(params, golden(kind, 1, 4, options), strict=True):
        torch.testing.assert_close(have.detach(), want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_alone(pool1, kind):
    for options in (
        {"damping": 0.03, "factor_decay": 0.05, "kl_clip": 0.001},
        {"damping": 0.3, "factor_decay": 0.9, "kl_clip": None},
    ):
        pool1.run(alone, kind, options)
