"""Steps that raise: what they have left, and that no rank waits for what another one does not do."""

import contextlib
import sys

import pytest
import torch
import training

import dear


def batches_that_fail(rank, world, update, failing):
    """The optimizer raises before it has changed anything, on every rank, and the script skips the batch."""

    def step(model, optimizer, rank, number):
        loss = training.loss_of(model, rank, number)
        loss.backward()
        (group,) = optimizer.param_groups
        betas, group["betas"] = group["betas"], None if number in failing else group["betas"]
        with contextlib.suppress(TypeError):
            optimizer.step()
        group["betas"] = betas
        optimizer.zero_grad()
        return loss.item()

    for options in ({}, {"foreach": False}):
        kind = (torch.optim.AdamW, {"lr": 0.01, **options})
        training.compare(rank, world, "Mlp", kind, attach={**training.SMALL, "update": update}, step=step, steps=7)


@pytest.mark.parametrize("failing", [{0}, {1}, {4}, {2, 3}], ids=str)
@pytest.mark.parametrize("update", ["sharded", "owned"])
def test_a_step_that_fails_leaves_no_rank_waiting(pool2, update, failing):
    """Whether or not a rank has anything to update where it fails."""
    pool2.run(batches_that_fail, update, failing)


def told_late(rank, world):
    model, opt = training.build("Mlp", (torch.optim.AdamW, {"lr": 0.01}), {})
    with dear.attach(model, opt, update="replicated", **training.SMALL) as engine:
        for step in range(3):
            training.plain_step(model, opt, rank, step)
        training.loss_of(model, rank, 3).backward()
        opt.param_groups[0]["betas"] = None
        opt.step()
        with pytest.raises(TypeError) as raised:
            training.loss_of(model, rank, 4)
        if sys.version_info >= (3, 11):
            assert raised.value.__notes__[0].startswith("It was raised by an update of the last optimizer.step()")
        for _ in engine._attached.order:  # the other groups' updates
            with contextlib.suppress(TypeError):
                engine.synchronize()


def test_an_error_of_a_late_update_says_whose_it_is(pool2):
    pool2.run(told_late)
