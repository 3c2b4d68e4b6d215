"""Steps that raise: what they have left, and that no rank waits for what another one does not do."""

import contextlib

import pytest
import torch
import training


def batches_that_fail(rank, world, update, failing):
    """The optimizer raises before it has changed anything, on every rank, and the script goes on with the next one."""

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
        training.compare(
            rank, world, "Mlp", kind, attach={**training.SMALL, "update": update}, step=step, steps=7, exact=world == 2
        )


@pytest.mark.parametrize("failing", [{0}, {1}, {4}, {2, 3}], ids=str)
@pytest.mark.parametrize("update", ["sharded", "owned"])
def test_a_step_that_fails_leaves_no_rank_waiting(pool2, update, failing):
    """Whether or not a rank has anything to update where it fails."""
    pool2.run(batches_that_fail, update, failing)
