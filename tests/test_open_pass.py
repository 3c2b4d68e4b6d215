"""A forward pass that is open while attach(), detach() or a compressor's removal replaces DDP's reducer."""

import pytest
import torch
import training
from refusing import SMALL, both_modes, refused, trains_on_like_plain, warm

import compress
import dear

BEFORE = "The forward pass of this backward pass ran before"


def refused_then_plain(rank, model, opt, loss, steps):
    """The open pass, and training that goes on as if it had not been: from step number ``steps`` on."""
    with refused(RuntimeError, BEFORE):
        loss.backward()
    opt.zero_grad()
    trains_on_like_plain(rank, model, opt, steps)


def backward_after_attach(rank, world, update):
    model, opt = training.build("Mlp", training.SGD, {})
    loss = training.loss_of(model, rank, 0)
    engine = dear.attach(model, opt, update=update, **SMALL)
    refused_then_plain(rank, model, opt, loss, 0)
    engine.detach()


@both_modes
def test_backward_after_attach(pool2, update):
    pool2.run(backward_after_attach, update)


def backward_after_detach(rank, world, update):
    model, opt, engine = warm(rank, update)
    loss = training.loss_of(model, rank, 3)
    engine.detach()
    refused_then_plain(rank, model, opt, loss, 3)


@both_modes
def test_backward_after_detach(pool2, update):
    pool2.run(backward_after_detach, update)


def backward_after_removal(rank, world):
    model, opt = training.build("Mlp", training.SGD, {})
    hook = compress.register(model, compress.ACPSGD(rank=2, start_step=100))
    training.plain_step(model, opt, rank, 0)
    loss = training.loss_of(model, rank, 1)
    hook.remove()
    refused_then_plain(rank, model, opt, loss, 1)


def test_backward_after_removal(pool2):
    pool2.run(backward_after_removal)


def evaluated_with_gradients(rank, world, update, find_unused):
    """No backward pass comes of it, so nothing is refused: before attach(), before detach(), under no_sync()."""
    model, opt = training.build("Mlp", training.SGD, {"find_unused_parameters": find_unused})
    training.loss_of(model, rank, 50)
    engine = dear.attach(model, opt, update=update, **SMALL)
    for step in range(3):
        training.plain_step(model, opt, rank, step)
    training.loss_of(model, rank, 50)
    engine.detach()
    with model.no_sync():  # local, as under plain DDP
        training.loss_of(model, rank, 50).backward()
    opt.zero_grad()
    trains_on_like_plain(rank, model, opt, 3)


@pytest.mark.parametrize("find_unused", [False, True], ids=["all used", "unused sought"])
@both_modes
def test_evaluated_with_gradients(pool2, update, find_unused):
    pool2.run(evaluated_with_gradients, update, find_unused)


def second_backward(rank, world, update):
    """Of two forward passes, DDP reduces the first one's backward pass alone."""
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 2))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dear.attach(model, opt, update=update)
    for _ in range(2):
        x = torch.full((3, 4), float(rank))
        (model(x).sum() + model(x).sum()).backward()
        opt.step()
        opt.zero_grad()
    model(x)
    (model(x).sum() + model(x).sum()).backward()
    opt.step()
    opt.step()  # twice with the same average, as plain DDP may
    opt.zero_grad()
    first, second = model(x).sum(), model.module.bias.sum() + model(x).detach().sum()
    first.backward()
    opt.step()
    opt.zero_grad()
    second.backward()
    with refused(RuntimeError, "reduces one backward pass, however many forward passes"):
        opt.step()
    opt.zero_grad()
    engine.detach()


@pytest.mark.parametrize("update", ["sharded", "owned"])
def test_a_second_backward_pass_is_not_mixed(pool2, update):
    pool2.run(second_backward, update)
