"""What the tests of refusals share: the sentence's form, and training that goes on as if nothing had been."""

import contextlib

import pytest
import torch
import training
from training import SMALL

import dear

both_modes = pytest.mark.parametrize("update", ["sharded", "replicated"])


def final(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same(have, want):
    for name, value in want.items():
        assert torch.equal(have[name], value), name


@contextlib.contextmanager
def refused(kind, match):
    """The sentence is one: it says what is wrong and, after a colon, what to do."""
    with pytest.raises(kind, match=match) as caught:
        yield
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message, message


def warm(rank, update, steps=3, **attach):
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=update, **{**SMALL, **attach})
    for step in range(steps):
        training.plain_step(model, opt, rank, step)
    return model, opt, engine


def trains_on_like_plain(rank, model, opt, steps):
    """From step number ``steps`` on, as plain DDP that made as many steps."""
    plain, plain_opt = training.build("Mlp", training.SGD, {})
    for step in range(steps + 3):
        want = training.plain_step(plain, plain_opt, rank, step)
        if step >= steps:
            assert training.plain_step(model, opt, rank, step) == want
    same(final(model), final(plain))
