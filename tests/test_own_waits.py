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
