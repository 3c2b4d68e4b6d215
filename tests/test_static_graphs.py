"""``static_graph=True``: DDP learns the graph from its reducer's first pass, whoever gave it a new reducer."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
import torch.nn.functional as F
import training
from machine.case import Case
from machine.search import run
from models import data
from silence import BOTH, EVERY, check_told, pieces, told
from test_auto_switching import Scripted

import compress
import dear
from dear._assembly import Setting

STATIC = {"static_graph": True}
DENSE = {"rank": 2, "start_step": 10**6}
PENALTY = """
v = x(74).requires_grad_()
slope, = torch.autograd.grad(model(v).sum(), v, create_graph=True)
(F.mse_loss(model(x(74)), y(74)) + slope.pow(2).mean()).backward()
"""


@pytest.mark.parametrize("how", EVERY)
def test_a_static_graph_is_not_learnt_from_a_penalty(pool2, how):
    """DDP reduces nothing in such a pass, and plain DDP, which has learnt the graph before, does."""
    program = pieces(f"train(0)\n\nattach()\n{PENALTY}")
    (outcome,) = run(pool2, [Case(how, "StaticallyUnused", ddp={"static_graph": True}, program=program)])
    assert outcome.kind == "refused" and "static_graph=True the first pass after" in outcome.text, outcome


@pytest.mark.parametrize("how", BOTH)
def test_a_static_graph_is_not_learnt_from_a_penalty_behind_detach(pool2, how):
    ordinary = "detach()\n\ntrain(3)\n"
    for between, kind in (("detach()\n", "refused"), (ordinary, "equal")):
        program = pieces(f"train(0)\n\nattach()\n\ntrain(1)\n\n{between}{PENALTY}\nopt.step()")
        (outcome,) = run(pool2, [Case(how, "StaticallyUnused", ddp={"static_graph": True}, program=program)])
        assert outcome.kind == kind and ("engine.detach() must not" in outcome.text) == (kind == "refused"), outcome


def with_penalty(model, optimizer, rank, step):
    """A step whose first gradients are of ``torch.autograd.grad()``."""
    x, y = data(rank, step)
    x.requires_grad_()
    slope, *_ = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (F.mse_loss(model(x), y) + slope.pow(2).mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def behind_detach(model, opt, rank):
    engine = dear.attach(model, opt, **training.SMALL)
    training.plain_step(model, opt, rank, 1)
    engine.detach()


def behind_removal(model, opt, rank):
    registration = compress.register(model, compress.ACPSGD(**DENSE))
    training.plain_step(model, opt, rank, 1)
    registration.remove()


def behind_a_switch(model, opt, rank):
    """To DDP's own schedule, at the first forward pass of the second step."""
    settings = {0: Setting("sharded", 0.002), 1: Setting("ddp", 0.002)}
    dear.attach(model, opt, compressor=Scripted(settings))
    training.plain_step(model, opt, rank, 1)


def behind_another_size(model, opt, rank):
    settings = {0: Setting("ddp", 0.002), 1: Setting("ddp", 0.004)}
    dear.attach(model, opt, compressor=Scripted(settings))
    training.plain_step(model, opt, rank, 1)


ROADS = {
    "detach": (behind_detach, "engine.detach()"),
    "removal": (behind_removal, "the removal of a compressor"),
    "switch": (behind_a_switch, "dear.attach()"),
    "another size": (behind_another_size, "dear.attach()"),
}


@told
def penalized_at_once(rank, world, road):
    model, opt = training.build("StaticallyUnused", training.SGD, STATIC)
    make, caller = ROADS[road]
    make(model, opt, rank)
    with pytest.raises(RuntimeError, match=re.escape(f"With static_graph=True the first pass after {caller} must not")):
        with_penalty(model, opt, rank, 2)


@told
def penalized_later(rank, world, road):
    plain, plain_opt = training.build("StaticallyUnused", training.SGD, STATIC)
    model, opt = training.build("StaticallyUnused", training.SGD, STATIC)
    training.plain_step(plain, plain_opt, rank, 1)
    ROADS[road][0](model, opt, rank)
    for step in range(2, 4):
        training.plain_step(plain, plain_opt, rank, step)
        training.plain_step(model, opt, rank, step)
    with_penalty(plain, plain_opt, rank, 4)
    with_penalty(model, opt, rank, 4)
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any(type(hook).__module__ == "dear._first_pass" for hook in model._forward_pre_hooks.values())
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())


@pytest.mark.parametrize("road", ROADS)
def test_a_graph_is_not_learnt_from_a_penalty_by_any_road(pool2, road):
    check_told(pool2, penalized_at_once, road)


@pytest.mark.parametrize("road", ROADS)
def test_a_penalty_comes_behind_an_ordinary_pass(pool2, road):
    check_told(pool2, penalized_later, road)


@told
def attached_again(rank, world):
    """With no pass between: what watched plain DDP's reducer is over with it."""
    model, opt = training.build("StaticallyUnused", training.SGD, STATIC)
    behind_detach(model, opt, rank)
    with torch.no_grad():
        training.loss_of(model, rank, 2)
    engine = dear.attach(model, opt, **training.SMALL)
    with pytest.raises(RuntimeError, match="the first pass after dear"):
        with_penalty(model, opt, rank, 3)
    engine.detach()


def test_a_module_attached_again(pool2):
    check_told(pool2, attached_again)


@told
def copied(rank, world, between):
    """A copy of a module that waits for its first pass has a reducer of its own, and trains."""
    model, opt = training.build("StaticallyUnused", training.SGD, STATIC)
    behind_detach(model, opt, rank)
    if between:
        training.loss_of(model, rank, 2)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        again = torch.optim.SGD(twin.parameters(), lr=0.05)
        with_penalty(twin, again, rank, 3)


@pytest.mark.parametrize("between", [False, True])
def test_a_copy_is_not_watched(pool2, between):
    check_told(pool2, copied, between)


def of_two_types(rank, how):
    """Trains a model of two types; DDP has a bucket for each, and hands both out at the end of the first pass."""
    model, opt = training.build("MixedTypes", training.SGD, STATIC)
    compressor = compress.PowerSGD(rank=1, min_compression_ratio=0.1)
    engine = None
    if how in ("sharded", "owned", "replicated"):
        engine = dear.attach(model, opt, update=how)
    elif how == "compressed":
        engine = dear.attach(model, opt, compressor=compressor)
    elif how == "register":
        compress.register(model, compressor)
    elif how == "hook":
        model.register_comm_hook(compressor, compress.comm_hook)
    for step in range(5):
        training.plain_step(model, opt, rank, step)
    if engine is not None:
        engine.detach()
    return [param.detach() for param in model.parameters()], compressor.step


@told
def of_two_types_alike(rank, world, how):
    have, steps = of_two_types(rank, how)
    everyone = [None] * world
    torch.distributed.all_gather_object(everyone, have)
    for other in everyone:
        assert all(map(torch.equal, other, have)), "replicas differ"
    if how in ("sharded", "owned", "replicated"):
        assert all(map(torch.equal, have, of_two_types(rank, None)[0])), "not plain DDP's training"
    else:
        assert steps == 5, steps


@pytest.mark.parametrize("how", ["sharded", "owned", "replicated", "compressed", "register", "hook"])
def test_the_first_pass_may_have_several_buckets(pool2, how):
    check_told(pool2, of_two_types_alike, how)
