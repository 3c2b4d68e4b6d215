"""Mistakes that somebody makes in the first hour: one sentence that helps, on every rank, and no wait for a timeout."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import training
from refusing import SMALL, refused, trains_on_like_plain

import compress
import dear


def group_on_one_rank(rank, world):
    """Another group of the same ranks would wait for those of the first one."""
    model, opt = training.build("Mlp", training.SGD, {})
    group = dist.new_group([0, 1])
    with refused(ValueError, r"Ranks 0 and 1 disagree on process_group"):
        dear.attach(model, opt, process_group=group if rank == 0 else None)
    engine = dear.attach(model, opt, process_group=group)
    trains_on_like_plain(rank, model, opt, 0)
    engine.detach()


def test_a_group_that_one_rank_alone_was_given(pool2):
    pool2.run(group_on_one_rank)


def another_rate(rank, world):
    model, opt = training.build("Mlp", (torch.optim.AdamW, {"lr": 0.01, "betas": (0.9, 0.99 + rank / 1000)}), {})
    with refused(ValueError, r"Ranks 0 and 1 disagree on betas of AdamW's group 0 \(\[0\.9, 0\.99\] and"):
        dear.attach(model, opt)


def test_an_option_that_differs_between_ranks(pool2):
    pool2.run(another_rate)


def other_optimizer(rank, world, kind, options):
    """Of two optimizers one was given, or the optimizer was made anew: the other steps with what only shards have."""
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update="sharded", **SMALL)
    training.plain_step(model, opt, rank, 0)
    anew = kind(model.parameters(), lr=0.1, **options)
    training.loss_of(model, rank, 1).backward()
    with refused(RuntimeError, r"give dear\.attach\(\) every optimizer that steps"):
        anew.step()
    engine.detach()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"foreach": False}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
    ids=str,
)
def test_an_optimizer_that_was_not_given(pool2, kind, options):
    pool2.run(other_optimizer, kind, options)


def hooked(rank, world):
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, **SMALL)
    with refused(RuntimeError, r"is attached already.*pass a compressor to dear\.attach\(\)"):
        compress.register(model, compress.PowerSGD(rank=2))
    trains_on_like_plain(rank, model, opt, 0)
    engine.detach()


def test_a_compressor_is_registered_beside_the_schedule(pool2):
    pool2.run(hooked)
