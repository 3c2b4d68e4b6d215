"""How people train on GPUs: under autocast with a GradScaler, channels last, compiled.

Each is compared with plain DDP: here on the host, and in test_cuda.py on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import training
from place import place
from torch import nn
from training import SMALL
from workers import WorkerPool

import dear

MODES = ["sharded", "replicated"]


def autocast(rank: int, world: int, mode: str) -> None:
    """float16 with a GradScaler where there is a GPU, bfloat16 elsewhere; a step of it overflows."""
    dtype = torch.float16 if place().type == "cuda" else torch.bfloat16

    def run(attach: dict[str, Any] | None) -> Any:
        scale = torch.amp.GradScaler(place().type, init_scale=2.0**10, growth_interval=2)

        def step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, index: int) -> float:
            with torch.autocast(place().type, dtype):
                loss = training.loss_of(model, rank, index) * (1e38 if index == 3 else 1)
            scale.scale(loss).backward()
            scale.step(optimizer)
            scale.update()
            optimizer.zero_grad()
            return scale.get_scale()

        return [training.train(rank, model, attach=attach, step=step) for model in ("Mlp", "Convolution")]

    equal(run(None), run({**SMALL, "update": mode}))


def channels_last(rank: int, world: int, mode: str) -> None:
    """The whole model and its input, as torch's own advice for convolutions is."""

    def run(attach: dict[str, Any] | None) -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
        net = net.to(place(), memory_format=torch.channels_last)
        model = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        engine = dear.attach(model, optimizer, **attach) if attach else None
        losses = []
        for step in range(5):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + rank)).to(place())
            loss = model(x.to(memory_format=torch.channels_last)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        final = {name: value.clone() for name, value in net.state_dict().items()}
        if engine is not None:
            engine.detach()
        assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
        return [(losses, final)]

    equal(run(None), run({**SMALL, "update": mode}))


def compiled(rank: int, world: int, mode: str) -> None:
    """The model compiled in place, in front of DDP."""

    def run(attach: dict[str, Any] | None) -> Any:
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)).to(place())
        net.compile(backend="aot_eager")
        model = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        engine = dear.attach(model, optimizer, **attach) if attach else None
        losses = [training.plain_step(model, optimizer, rank, step) for step in range(5)]
        final = {name: value.clone() for name, value in net.state_dict().items()}
        if engine is not None:
            engine.detach()
        return [(losses, final)]

    equal(run(None), run({**SMALL, "update": mode}))


def equal(want: Any, have: Any) -> None:
    for (losses, final), (own_losses, own) in zip(want, have, strict=True):
        assert own_losses == losses
        for name, value in final.items():
            assert torch.equal(own[name], value), name


FORMS = {"autocast": autocast, "channels last": channels_last, "compiled": compiled}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", [*FORMS][:2])
def test_as_with_plain_ddp(pool2: WorkerPool, form: str, mode: str) -> None:
    pool2.run(FORMS[form], mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled(pool2: WorkerPool, mode: str) -> None:
    pool2.run(compiled, mode)
