"""After an error of the script's, such as one in a notebook's cell, the same processes attach anew."""

import pytest
import torch
import training
from refusing import SMALL, trains_on_like_plain

import dear


def again(rank, world, update, all_fail):
    for turn in range(6):
        model, opt = training.build("Mlp", training.SGD, {})
        # The others have the news of whoever failed.
        with pytest.raises((KeyError, RuntimeError)), dear.attach(model, opt, update=update, **SMALL):
            training.plain_step(model, opt, rank, 0)
            if all_fail or rank == turn % world:
                raise KeyError("a mistake in the script")
            for step in range(3):
                training.plain_step(model, opt, rank, step)
        torch.distributed.barrier()
        model, opt = training.build("Mlp", training.SGD, {})
        with dear.attach(model, opt, update=update, **SMALL):
            training.plain_step(model, opt, rank, 0)
    if world == 2:
        model, opt = training.build("Mlp", training.SGD, {})
        with dear.attach(model, opt, update=update, **SMALL):
            trains_on_like_plain(rank, model, opt, 0)


@pytest.mark.parametrize("all_fail", [True, False], ids=["all fail", "one fails"])
@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_an_error_on_every_rank_is_the_end_of_one_engine(pool4, update, all_fail):
    pool4.run(again, update, all_fail)


def test_training_goes_on_as_plain(pool2):
    pool2.run(again, "sharded", True)
