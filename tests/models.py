"""Small models that read their parameters in all the ways that make waiting for them hard."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Mlp(nn.Module):
    """Three layers of uneven sizes: shards cut through the middle of parameters."""

    def __init__(self, width: int = 37) -> None:
        super().__init__()
        self.first = nn.Linear(16, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Aligned(Mlp):
    """Of even sizes: laid side by side, every parameter begins at a multiple of 16 bytes."""

    def __init__(self) -> None:
        super().__init__(36)


class Tied(nn.Module):
    """A head that shares the first layer's weight, through a second module and by function."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16, bias=False)
        self.middle = nn.Linear(16, 16)
        self.head = nn.Linear(16, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.middle(self.embed(x)))) @ self.embed.weight[:, :8]


class Functional(nn.Module):
    """The root reads its children's weights before they run, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.never_called = nn.Linear(16, 16)
        self.body = nn.Linear(16, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.last.weight.norm()
        x = F.linear(x, self.never_called.weight, self.never_called.bias)
        return self.last(torch.tanh(self.body(x))) * scale


class Attention(nn.Module):
    """nn.MultiheadAttention reads out_proj's weight without calling out_proj."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.view(-1, 2, 16)
        return self.last(self.attention(y, y, y)[0]).reshape(x.shape[0], -1)[:, :8]


class Checkpointed(nn.Module):
    """Runs part of its forward again inside backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.second, self.first(x), use_reentrant=False))


class Convolution(nn.Module):
    """A channels-last weight, whose gradient is not laid out as its shape says, and batch norm's buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.last = nn.Linear(5 * 4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.norm(self.conv(x.view(-1, 1, 4, 4)))).flatten(1))


class Unused(nn.Module):
    """A branch taken by nobody, and one taken by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.odd = nn.Linear(16, 16)
        self.never = nn.Linear(16, 16)
        self.last = nn.Linear(16, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        x = self.first(x)
        if self.calls % 3 == 2:
            x = self.odd(x)
        return self.last(x)


class StaticallyUnused(Unused):
    """The same, but the graph never changes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


class Frozen(Mlp):
    """A layer that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.second.requires_grad_(False)


class MixedTypes(nn.Module):
    """Parameters of two dtypes, so DDP makes buckets of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16).double()
        self.last = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x.double())).float())


def data(rank: int, step: int, batch: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets that differ by rank and step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(batch, 16, generator=generator), torch.randn(batch, 8, generator=generator)
