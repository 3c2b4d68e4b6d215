"""Numbers near the end of their type's range: averages that exist are found, and what overflows is said."""

import pytest
import torch
from compressing import KINDS
from silence import check_told, known, told
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear

LARGE = {torch.float16: 40_000.0, torch.bfloat16: 2e38, torch.float32: 2e38, torch.float64: 1e308}
ALGORITHMS = ("ring", "native")


@told
def averages(rank, world, dtype, algorithm):
    """Every rank has the same value, whose sum overflows; plain DDP divides first."""
    value = LARGE[dtype]
    want = torch.full((37,), value, dtype=dtype)
    have = want.clone()
    dear.all_reduce(have, op="avg", algorithm=algorithm).wait()
    torch.testing.assert_close(have, want)
    shard = dear.reduce_scatter(want, op="avg", algorithm=algorithm).wait()
    torch.testing.assert_close(shard, want[: shard.numel()])


@pytest.mark.parametrize(
    ("dtype", "algorithm"),
    [known(f"average-{dtype}-{algorithm}", dtype, algorithm) for dtype in LARGE for algorithm in ALGORITHMS],
)
def test_an_average_of_large_values_is_finite(pool4, dtype, algorithm):
    check_told(pool4, averages, dtype, algorithm)


class Scaled(nn.Module):
    """Its parameters' gradients are what it was called with."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(40, 30, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(40, dtype=dtype))

    def forward(self, size):
        return (self.weight * size).sum() + (self.bias * size).sum()


def final(rank, how, dtype, steps=3):
    model = DDP(Scaled(dtype))
    opt = torch.optim.SGD(model.parameters(), lr=0.1 / LARGE[dtype])
    if how in ("sharded", "replicated"):
        dear.attach(model, opt, update=how, bucket_cap_mb=0.002)
    elif how == "register":
        compress.register(model, compress.ACPSGD(rank=2, start_step=10**6))
    for _ in range(steps):
        model(LARGE[dtype]).backward()
        opt.step()
        opt.zero_grad()
    return {name: value.clone() for name, value in model.module.state_dict().items()}


@told
def trained(rank, world, how, dtype):
    want = final(rank, "ddp", dtype)
    assert all(value.isfinite().all() for value in want.values())
    for name, value in final(rank, how, dtype).items():
        torch.testing.assert_close(value, want[name])


@pytest.mark.parametrize(
    ("how", "dtype"),
    [known(f"trained-{how}-{dtype}", how, dtype) for how in ("sharded", "replicated", "register") for dtype in LARGE],
)
def test_large_gradients_train_as_plain_ddp(pool4, how, dtype):
    check_told(pool4, trained, how, dtype)


@told
def overflowing(rank, world, kind, scheduled, policy, value):
    """A finite gradient from which a compressor's own arithmetic may make an infinite one."""
    torch.manual_seed(0)
    model = DDP(nn.Linear(64, 64))
    opt = torch.optim.SGD(model.parameters(), lr=1e-39)
    compressor = KINDS[kind](min_compression_ratio=0.2, nonfinite=policy)
    if scheduled:
        dear.attach(model, opt, compressor=compressor, bucket_cap_mb=0.002)
    else:
        compress.register(model, compressor)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        scale = torch.rand(64, generator=generator) * (value if step > 1 else 1.0)
        try:
            (model(torch.ones(1, 64)) * scale).sum().backward()
            opt.step()
        except RuntimeError as error:
            assert policy == "raise" and "not finite" in str(error), error
            return
        if policy == "propagate" and step > 1 and any(not p.grad.isfinite().all() for p in grads_of(model)):
            return  # it showed, and a GradScaler would have skipped the step
        opt.zero_grad()
        for name, param in model.module.state_dict().items():
            assert param.isfinite().all(), f"{name} is not finite after step {step}, and nobody said so"


def grads_of(model):
    return [param for param in model.module.parameters() if param.grad is not None]


@pytest.mark.parametrize(
    ("kind", "scheduled", "policy", "value"),
    [
        known(
            f"overflow-{kind}-{'scheduled' if scheduled else 'hook'}-{policy}-{value}", kind, scheduled, policy, value
        )
        for kind in KINDS
        for scheduled in (False, True)
        for policy in ("raise", "skip")
        for value in (1e38, 3e38)
    ],
)
def test_what_overflows_inside_a_compressor_is_said(pool2, kind, scheduled, policy, value):
    check_told(pool2, overflowing, kind, scheduled, policy, value)


@told
def norms_of_float64(rank, world, update):
    """A norm of float64 gradients is not rounded to float32."""
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 4)).double())
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    model(x).square().sum().backward()
    want = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    opt.zero_grad()
    engine = dear.attach(model, opt, update=update, bucket_cap_mb=0.001)
    model(x).square().sum().backward()
    have = engine.clip_grad_norm_(1e9)
    engine.detach()
    torch.testing.assert_close(have, want, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("update", ["sharded", "owned"])
def test_a_norm_has_the_precision_of_the_gradients(pool2, update):
    check_told(pool2, norms_of_float64, update)


@told
def clipped_by_one(rank, world):
    """A gradient that one rank owns is clipped and kept: the local ones of the other rank follow, too."""

    def train(update):
        torch.manual_seed(0)
        model = DDP(nn.Linear(16, 4, bias=False))
        opt = torch.optim.Adafactor(model.parameters(), lr=0.05)
        engine = dear.attach(model, opt, update=update) if update else None
        for step in range(3):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + rank))
            model(x).square().sum().backward()
            clip = engine.clip_grad_norm_ if engine else lambda norm: nn.utils.clip_grad_norm_(model.parameters(), norm)
            clip(0.5)
            opt.step()
        return model.module.weight.detach().clone()

    want, have = train(None), train("owned")
    torch.testing.assert_close(have, want)


def test_local_gradients_follow_where_nothing_is_owned(pool2):
    check_told(pool2, clipped_by_one)
