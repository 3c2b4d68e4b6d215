"""A compressor that is taken off a model: plain DDP goes on, and so does the compressor on another model."""

import compressing
import pytest
import torch
from compressing import KINDS, SHAPES, backward, gradients
from place import place
from silence import check_told, told
from test_compressors_feedback import Account
from torch.nn.parallel import DistributedDataParallel as DDP

import compress


def plain(world, step):
    return {name: sum(gradients(rank, step)[name] for rank in range(world)) / world for name in SHAPES}


@told
def removed(rank, world, kind):
    """Nothing that was not sent yet is lost on the way from one model to the next, and back to the first."""
    compressor, account = KINDS[kind](), Account()
    models = [DDP(compressing.Prescribed().to(place()), **compressing.SEVERAL_BUCKETS) for _ in range(2)]
    step = 0
    for model in (models[0], models[1], models[0]):
        registration = compress.register(model, compressor)
        for _ in range(2):
            account.add(world, step, backward(model, gradients(rank, step)))
            account.check(compressor)
            step += 1
        assert compressor.step == step
        registration.remove()
        registration.remove()  # once is enough
        assert compressor.step == step and "forward" not in model.__dict__ and not model._comm_hooks
        have = backward(model, gradients(rank, 100))
        for name, value in plain(world, 100).items():
            torch.testing.assert_close(have[name], value)
    first, second = compress.register(models[0], compressor), KINDS[kind]()
    first.remove()
    compress.register(models[1], compressor)
    first.remove()  # of a registration that is over
    compress.register(models[0], second)
    account.add(world, step, backward(models[1], gradients(rank, step)))
    account.check(compressor)


@pytest.mark.parametrize("kind", ["power", "topk"])
def test_a_compressor_is_taken_off(pool2, kind):
    check_told(pool2, removed, kind)
