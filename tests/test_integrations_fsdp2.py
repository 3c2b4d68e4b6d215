"""FSDP2 with this library's collectives: bit for bit as with its own, or in 16 bits with error feedback."""

import copy

import models
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dear.integrations import fsdp2


class Deep(torch.nn.Module):
    def __init__(self, width=40):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16 if i == 0 else width, width) for i in range(4))
        self.last = torch.nn.Linear(width, 8)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.last(x)


def build(ours, policy=None, **options):
    torch.manual_seed(0)
    model = Deep()
    arguments = {} if policy is None else {"mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, **arguments)
    fully_shard(model, **arguments)
    wire = fsdp2.use(model, **options) if ours else None
    return model, torch.optim.AdamW(model.parameters(), lr=0.01), wire


def train(model, optimizer, rank, steps, scale=1.0):
    losses = []
    for step in steps:
        x, y = models.data(rank, step)
        loss = F.mse_loss(model(x).float(), y) * scale
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: whole(value) for name, value in model.state_dict().items()}


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


POLICIES = {
    "float32": None,
    "bf16": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
    "bf16 both": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
}


def equal(rank, world, policy):
    want = train(*build(False, POLICIES[policy])[:2], rank, range(6))
    have = train(*build(True, POLICIES[policy])[:2], rank, range(6))
    for name, value in want[1].items():
        if world == 2 and policy != "bf16 both":
            assert torch.equal(have[1][name], value), name
        else:
            near = {"rtol": 0.1, "atol": 0.02} if policy == "bf16 both" else {}
            torch.testing.assert_close(have[1][name], value, **near)
    if world == 2 and policy != "bf16 both":
        assert have[0] == want[0]


@pytest.mark.parametrize("policy", POLICIES)
def test_training_is_fsdps(pool2, policy):
    pool2.run(equal, policy)


def test_training_with_three_ranks(pool3):
    pool3.run(equal, "float32")


def narrow(rank, world, wire):
    want = train(*build(False)[:2], rank, range(12))
    sent = train(*build(True, wire=wire)[:2], rank, range(12))
    fed = train(*build(True, wire=wire, error_feedback=True)[:2], rank, range(12))
    near = 0.01 if wire.itemsize == 2 else 0.03
    assert sent[0][-1] != want[0][-1]
    assert sent[0][-1] == pytest.approx(want[0][-1], rel=near)
    assert fed[0][-1] == pytest.approx(want[0][-1], rel=near)


def test_gradients_in_16_bits(pool2):
    pool2.run(narrow, torch.bfloat16)


@pytest.mark.parametrize("wire", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
def test_gradients_in_8_bits(pool2, wire):
    pool2.run(narrow, wire)


def not_finite(rank, world, wire):
    """A gradient that is not finite on one rank shows on the owner, as FSDP's own would, and is not kept."""
    model, optimizer, kept = build(True, wire=wire, error_feedback=True)
    x, y = models.data(rank, 0)
    (F.mse_loss(model(x), y) * (torch.inf if rank else 1.0)).backward()
    assert any(not whole(param.grad).isfinite().all() for param in model.parameters())
    assert all(error.isfinite().all() for error in kept.state_dict()["errors"].values())
    optimizer.zero_grad()
    losses, _ = train(model, optimizer, rank, range(2))
    assert all(loss < float("inf") for loss in losses)


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
def test_a_gradient_that_is_not_finite(pool2, wire):
    pool2.run(not_finite, wire)


def conserved(rank, world, wire_dtype):
    """What owners got is the average of what was to be sent, less what is kept."""
    model, _, wire = build(True, wire=wire_dtype, error_feedback=True)
    exact, _, _ = build(False)
    total = {name: 0.0 for name, _ in model.named_parameters()}
    wanted = dict(total)
    for step in range(5):
        x, y = models.data(rank, step)
        for each, sums in ((model, total), (exact, wanted)):
            F.mse_loss(each(x), y).backward()
            for name, param in each.named_parameters():
                sums[name] = sums[name] + whole(param.grad).double()
            each.zero_grad()
    off = sum(float((total[name] - wanted[name]).sum()) for name in total)
    kept = torch.tensor(
        sum(float(error.double().sum()) for error in wire.state_dict()["errors"].values()), dtype=torch.float64
    )
    torch.distributed.all_reduce(kept)
    assert abs(off) > 1e-6, "nothing was rounded"
    assert off + float(kept) / world == pytest.approx(0, abs=1e-6)


WIRES = pytest.mark.parametrize(
    "wire", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=["bf16", "int8", "float8"]
)


@WIRES
def test_error_feedback_conserves_the_sum(pool2, wire):
    pool2.run(conserved, wire)


def resumed(rank, world, wire_dtype):
    model, optimizer, wire = build(True, wire=wire_dtype, error_feedback=True)
    train(model, optimizer, rank, range(3))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), wire.state_dict()))
    assert len(saved[2]["errors"]) == 5
    want = train(model, optimizer, rank, range(3, 7))
    model, optimizer, wire = build(True, wire=wire_dtype, error_feedback=True)
    for part, state in zip((model, optimizer, wire), saved, strict=True):
        part.load_state_dict(state)
    have = train(model, optimizer, rank, range(3, 7))
    assert have[0] == want[0]
    with pytest.raises(KeyError, match='no FSDP module "other"'):
        wire.load_state_dict(saved[2] | {"errors": {"other": torch.zeros(1)}})
    with pytest.raises(KeyError, match='has the key "errors"'):
        wire.load_state_dict(saved[2]["errors"])
    for lie, who in (({"rank": 1 - rank}, f"rank {1 - rank} of 2"), ({"world_size": 4}, f"rank {rank} of 4")):
        with pytest.raises(ValueError, match=f"error feedback of {who}, and here is rank {rank} of 2"):
            wire.load_state_dict(saved[2] | lie)
    wire.load_state_dict(saved[2] | {"errors": {name: value[:-1] for name, value in saved[2]["errors"].items()}})
    with pytest.raises(ValueError, match="load what was saved of this model"):
        train(model, optimizer, rank, range(7, 8))


@WIRES
def test_a_run_is_resumed(pool2, wire):
    pool2.run(resumed, wire)


def refused(rank, world):
    with pytest.raises(ValueError, match="has no FSDP module"):
        fsdp2.use(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="wire must be"):
        build(True, wire=torch.int32)
    with pytest.raises(ValueError, match="error_feedback is for a wire of 16 or 8 bits"):
        build(True, error_feedback=True)
    model, optimizer, _ = build(True)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(3.0)
    with pytest.raises(ValueError, match="sums or averages gradients"):
        train(model, optimizer, rank, range(1))


def test_what_cannot_work_is_refused(pool2):
    pool2.run(refused)
