"""What is read in another order than in the forward pass that was observed still waits for what it reads."""

import time

import pytest
import torch
import torch.nn.functional as F
import training
from holding import HEAD_START, SMALL, WARM, hold_updates, parameters_of_plain_ddp, release, step_ahead, warm
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dear


class LateReader(nn.Module):
    """Reads its last layer's weight early, but only once told to: after the pass in which reads were observed."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.last = nn.Linear(16, 16)
        self.early = False

    def forward(self, x):
        x = self.first(x)
        if self.early:
            x = F.linear(x, self.last.weight)
        return self.last(x)[:, :8]


def late_reader(rank, world):
    torch.manual_seed(0)
    model = DDP(LateReader())
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dear.attach(model, opt, bucket_cap_mb=0.0005)
    for step in range(WARM):
        training.plain_step(model, opt, rank, step)
    if rank == 1:
        weight = model.module.last.weight
        readers = {
            i for i, places in enumerate(engine._attached.layout.groups) if any(p.param is weight for p in places)
        }
        hold_updates(engine, readers, "late reader")
    training.plain_step(model, opt, rank, WARM)
    model.module.early = True
    if rank == 0:
        model.module.first.register_forward_hook(lambda *_: release("late reader"))
    training.plain_step(model, opt, rank, WARM + 1)
    have = {name: value.clone() for name, value in model.module.state_dict().items()}
    engine.detach()

    torch.manual_seed(0)
    plain = DDP(LateReader())
    plain_opt = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(WARM + 2):
        plain.module.early = step == WARM + 1
        training.plain_step(plain, plain_opt, rank, step)
    for name, value in plain.module.state_dict().items():
        assert torch.equal(have[name], value), name


def test_a_read_that_nobody_could_foresee_waits(pool2):
    pool2.run(late_reader)


class Branch(nn.Module):
    """A branch that is taken only once told to."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.branch = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.last = nn.Linear(16, 8)
        self.taken = False

    def forward(self, x):
        x = self.first(x)
        return self.last(self.branch(x) if self.taken else x)


def branch(rank, world, update):
    def run(engine_of):
        torch.manual_seed(0)
        model = DDP(Branch(), find_unused_parameters=True)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        engine = engine_of(model, opt)
        for step in range(WARM + 4):
            model.module.taken = step > WARM
            if engine and update == "sharded" and step >= WARM:
                tag = f"branch {step}"
                step_ahead(rank, model, opt, engine, step, tag)
                if rank == 0:
                    release(tag)
            else:
                training.plain_step(model, opt, rank, step)
        state = {name: value.clone() for name, value in model.module.state_dict().items()}
        if engine:
            engine.detach()
        return state

    want = run(lambda model, opt: None)
    have = run(lambda model, opt: dear.attach(model, opt, update=update, bucket_cap_mb=0.0005))
    for name in want:
        assert torch.equal(want[name], have[name]), name


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_a_branch_never_seen_before_waits_for_everything(pool2, update):
    pool2.run(branch, update)


def failing_first(rank, world):
    """The observed forward pass must be one that went through to its end."""
    model, opt = training.build("Functional", training.SGD, {})
    engine = dear.attach(model, opt, **SMALL)
    with pytest.raises(RuntimeError):
        model(torch.ones(4, 3))  # fails after the first read
    for step in range(WARM):
        training.plain_step(model, opt, rank, step)
    want = parameters_of_plain_ddp(rank, "Functional", WARM + 2)
    for step in (WARM, WARM + 1):
        step_ahead(rank, model, opt, engine, step, f"failing {step}")
        if rank == 0:
            release(f"failing {step}")
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, want[WARM + 2][name]), name
    seen = engine._schedule._forward.seen
    assert any(model.module.never_called.weight is param for param in seen)
    engine.detach()


def test_a_first_forward_that_fails_is_observed_again(pool2):
    pool2.run(failing_first)


def between_backward_and_step(rank, world, update, fails):
    """A forward pass that no backward pass follows. DDP rebuilds its buckets in the first one after a backward."""

    def run(attach):
        model, opt = training.build("Mlp", training.SGD, {})
        engine = dear.attach(model, opt, update=update, **SMALL) if attach else None
        for step in range(WARM):
            training.loss_of(model, rank, step).backward()
            if fails:
                with pytest.raises(RuntimeError):
                    model(torch.ones(4, 3))
            else:
                model(torch.ones(4, 16))
            opt.step()
            opt.zero_grad()
        state = {name: value.clone() for name, value in model.module.state_dict().items()}
        if engine:
            engine.detach()
        return state

    want, have = run(False), run(True)
    for name, value in want.items():
        assert torch.equal(have[name], value), name


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_a_forward_between_backward_and_step_changes_no_gradient(pool2, update, fails):
    pool2.run(between_backward_and_step, update, fails)


def own_groups_only(rank, world):
    """The first layer computes while the last group's all-gather is still held back."""
    model, opt, engine = warm(rank, "Mlp", "sharded")
    assert len(engine._attached.order) > 1
    if rank == 1:
        hold_updates(engine, {engine._attached.order[-1]}, "own groups")
    training.plain_step(model, opt, rank, WARM)
    times = {}
    if rank == 0:
        first, last = model.module.first, model.module.last

        def first_is_through(*_):
            times["first"] = time.monotonic()
            release("own groups")

        first.register_forward_hook(first_is_through)
        last.register_forward_hook(lambda *_: times.update(last=time.monotonic()))
    training.plain_step(model, opt, rank, WARM + 1)
    if rank == 0:
        assert times["last"] - times["first"] > HEAD_START * 0.8, "the last group was not held back"
    engine.detach()


def test_modules_wait_for_their_own_groups_only(pool2):
    pool2.run(own_groups_only)
