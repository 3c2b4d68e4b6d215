"""Where DDP itself waits for all ranks in a backward pass: a peer that dies is named, as in our own waits."""

import os
import re
import signal

import pytest
import torch
import training
from holding import SMALL
from workers import run_workers

import compress
import dear
from dear import _ddp

FATAL = 3  # the step in which it happens
TRACKING = {"Unused": {"find_unused_parameters": True}, "StaticallyUnused": {"static_graph": True}}


def dies_in_backward(rank, world, how, net, fatal):
    """Rank 1 is killed between two layers of a backward pass; returns what the other one is told."""
    model, opt = training.build(net, training.SGD, TRACKING[net])
    if how == "register":
        compress.register(model, compress.Dense(torch.bfloat16))
    else:
        dear.attach(model, opt, update=how, **SMALL)
    with pytest.raises(RuntimeError) as caught:
        for step in range(20):
            loss = training.loss_of(model, rank, step)
            if rank == 1 and step == fatal:
                loss.register_hook(lambda grad: os.kill(os.getpid(), signal.SIGKILL))
            loss.backward()
            opt.step()
            opt.zero_grad()
    return str(caught.value)


CASES = [
    ("sharded", "Unused", FATAL),
    ("replicated", "Unused", 0),
    ("replicated", "StaticallyUnused", FATAL),
    ("register", "Unused", FATAL),
]


@pytest.mark.parametrize(("how", "net", "fatal"), CASES)
def test_a_peer_that_dies_is_named_where_unused_parameters_are_tracked(how, net, fatal):
    said, _ = run_workers(dies_in_backward, 2, how, net, fatal, expect_dead={1})
    assert not isinstance(said, Exception), said
    assert re.match(r"Rank 1 (closed|lost) its connection", said) and said.endswith("."), said


def dies_in_rebuild(rank, world):
    """Rank 1 is killed when it has come to DDP's rebuild of its buckets; returns what the other one is told."""
    model, opt = training.build("Mlp", training.SGD, {})
    dear.attach(model, opt, update="sharded", **SMALL)
    plain = _ddp.rebuild_buckets

    def rebuild(*arguments):
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments)

    _ddp.rebuild_buckets = rebuild
    with pytest.raises(RuntimeError) as caught:
        training.loss_of(model, rank, 0).backward()
    return str(caught.value)


def test_a_peer_that_dies_in_the_rebuild_of_buckets_is_named():
    said, _ = run_workers(dies_in_rebuild, 2, expect_dead={1})
    assert not isinstance(said, Exception), said
    assert re.match(r"Rank 1 (closed|lost) its connection .* DDP's buckets", said) and said.endswith("."), said


def stalls_before_buffers(rank, world, how):
    """Rank 1 stops before a forward pass in which DDP broadcasts buffers; returns what the others are told."""
    model, opt = training.build("Convolution", training.SGD, {})
    if how == "register":
        compress.register(model, compress.Dense(torch.bfloat16))
    else:
        dear.attach(model, opt, update=how, **SMALL)
    with pytest.raises(RuntimeError) as caught:
        for step in range(20):
            if rank == 1 and step == FATAL:
                os.kill(os.getpid(), signal.SIGSTOP)
            training.plain_step(model, opt, rank, step)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "world"), [("sharded", 2), ("replicated", 3), ("register", 2)])
def test_a_peer_that_stalls_is_named_where_buffers_are_broadcast(how, world):
    said = run_workers(stalls_before_buffers, world, how, expect_dead={1}, group_timeout=4.0)
    for rank in {*range(world)} - {1}:
        assert not isinstance(said[rank], Exception), said
        assert re.match(r"Rank 1 sent or took nothing for", said[rank]) and said[rank].endswith("."), said


def test_buffers_are_those_of_rank_0_though_ranks_are_told(pool2):
    """What is exchanged beside DDP's broadcast changes nothing, in whichever kind of forward pass."""
    pool2.run(forward_passes)


def forward_passes(rank, world):
    values = []
    for attach in (None, {"update": "sharded"}, {"update": "replicated"}):
        model, opt = training.build("Convolution", training.SGD, {})
        engine = dear.attach(model, opt, **SMALL, **attach) if attach else None
        for step in range(4):
            with torch.no_grad():
                model(training.models.data(rank, 9)[0])
            with model.no_sync():
                training.loss_of(model, rank, step).backward()
            training.plain_step(model, opt, rank, step)
        if engine:
            engine.detach()
        values.append([value.clone() for value in model.module.state_dict().values()])
    assert all(torch.equal(*pair) for have in values[1:] for pair in zip(have, values[0], strict=True))
