"""Parameters of 16 bits on the host, whose updates round by where an element stands: see Note [Updates on the host]."""

import itertools

import pytest
import torch
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel as DDP

import dear

OPTIMIZERS = {
    "SGD": (optim.SGD, {"lr": 0.1}),
    "momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "foreach": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "AdamW": (optim.AdamW, {"lr": 0.01}),
    "RMSprop": (optim.RMSprop, {"lr": 0.01, "momentum": 0.9}),
    "Adagrad": (optim.Adagrad, {"lr": 0.01}),
}


def trained(rank, dtype, kind, options, **attach):
    torch.manual_seed(0)
    # Sizes that are no multiples of a vector's, and one that torch divides among threads.
    sizes = [9, 17, 2001, 13, 3]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    model = DDP(nn.Sequential(*layers).to(dtype))
    optimizer = kind(model.parameters(), **options)
    engine = dear.attach(model, optimizer, **attach) if attach else None
    for step in range(4):
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(10 * step + rank)).to(dtype)
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if engine is not None:
        engine.detach()
    return [param.detach().clone() for param in model.parameters()]


def as_plain(rank, world, update, dtype):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name, (kind, options) in OPTIMIZERS.items():
            want = trained(rank, dtype, kind, options)
            for cap in (0.002, 1):
                have = trained(rank, dtype, kind, options, update=update, bucket_cap_mb=cap)
                for number, (one, other) in enumerate(zip(have, want, strict=True)):
                    differ = int((one != other).sum())
                    assert not differ, f"{name}, {cap} MiB: {differ} elements of parameter {number} differ"
    finally:
        torch.set_num_threads(threads)


def small_averages(rank, world, update):
    """Gradients below 6e-5, which float16 has as subnormal numbers: DDP rounds them as it divides."""

    def gradient(**attach):
        torch.manual_seed(0)
        model = DDP(nn.Linear(64, 64, bias=False).half())
        optimizer = optim.SGD(model.parameters(), lr=1.0)
        engine = dear.attach(model, optimizer, **attach) if attach else None
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(rank)).half()
        (model(x).float().square().mean() * 0.02).backward()
        if engine is not None:
            engine.detach()
        return model.module.weight.grad.clone()

    want = gradient()
    assert 0 < want.abs().median() < 2**-13
    assert torch.equal(gradient(update=update), want)


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_small_averages_of_float16(pool2, update):
    pool2.run(small_averages, update)


@pytest.mark.parametrize("update", ["sharded", "owned", "replicated"])
def test_bfloat16_trains_bit_for_bit(pool2, update):
    pool2.run(as_plain, update, torch.bfloat16)
