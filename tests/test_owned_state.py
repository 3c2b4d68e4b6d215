"""State of whole-matrix optimizers: what test_state.py does, with state of any shape that is on the owner alone."""

import owning
import pytest
import test_state
import torch
from torch import optim

OPTIMIZERS = {
    "AdamW": (owning.WholeAdamW, {"lr": 0.01, "amsgrad": True}),
    "Adafactor": (optim.Adafactor, {"lr": 0.01}),
    "factored": (owning.Factored, {"lr": 0.05}),
    "hybrid": (owning.muon_with_auxiliary, {}),
    "Adam": test_state.ADAM,
}
by_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def whole(rank, world, optimizer, name, *arguments):
    """A function of test_state.py, with another optimizer in place of its own."""
    kept, test_state.ADAM = test_state.ADAM, OPTIMIZERS[optimizer]
    try:
        getattr(test_state, name)(rank, world, *arguments)
    finally:
        test_state.ADAM = kept


@by_optimizer
@pytest.mark.parametrize("warm", [0, 1, 3])
def test_saved_and_resumed_training_equals_uninterrupted_training(pool2, optimizer, warm):
    pool2.run(test_state.resumed, "owned", OPTIMIZERS[optimizer], warm)


@by_optimizer
@pytest.mark.parametrize("when", ["before attach", "after attach", "later"])
def test_a_plain_optimizers_state_is_taken_over(pool2, optimizer, when):
    pool2.run(whole, optimizer, "from_plain", "owned", when)


@pytest.mark.parametrize("optimizer", ["AdamW", "factored", "Adam"])
@pytest.mark.parametrize("change", ["2 to 4", "4 to 2", "2 to 3"])
def test_a_job_resumes_at_another_world_size(pool2, pool3, pool4, optimizer, change, tmp_path):
    pools = {"2": pool2, "3": pool3, "4": pool4}
    before, after = pools[change[0]], pools[change[-1]]
    before.run(whole, optimizer, "save_for_others", "owned", str(tmp_path / "state.pt"))
    after.run(whole, optimizer, "resume_from_others", "owned", str(tmp_path / "state.pt"))


@pytest.mark.parametrize(
    ("optimizer", "first", "second"),
    [("Adam", "owned", "sharded"), ("Adam", "sharded", "owned"), ("AdamW", "owned", "replicated"),
     ("Adafactor", "replicated", "owned"), ("hybrid", "owned", "owned")],
)  # fmt: skip
def test_attach_and_detach_in_the_middle_of_training(pool2, optimizer, first, second):
    pool2.run(whole, optimizer, "in_and_out", first, second)


@by_optimizer
def test_detach_between_backward_and_step_keeps_the_gradients(pool2, optimizer):
    pool2.run(whole, optimizer, "in_mid_step", "owned")


@by_optimizer
def test_the_size_of_fusion_groups_changes_between_steps(pool2, optimizer):
    pool2.run(whole, optimizer, "recapped", "owned")


def test_a_process_group_that_is_part_of_the_world(pool4):
    pool4.run(whole, "AdamW", "in_part_of_the_world", "owned")


@pytest.mark.parametrize("optimizer", ["AdamW", "hybrid"])
def test_parameters_whose_storage_is_replaced(pool2, optimizer):
    pool2.run(whole, optimizer, "other_storage", "owned")


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam"])
def test_parameters_of_no_elements_and_of_no_dimension(pool2, optimizer):
    pool2.run(whole, optimizer, "with_empty", "owned")


def same_everywhere(rank, world):
    """Every rank gets the same full state, whoever owns it."""
    model, opt = test_state.training.build("Mlp", OPTIMIZERS["factored"], {})
    engine = test_state.dear.attach(model, opt, update="owned", **test_state.SMALL)
    test_state.steps(model, opt, rank, range(2))
    state = engine.state_dict()["optimizer"]["state"]
    engine.detach()
    return {index: values["left"].numpy() for index, values in state.items()}


def test_full_state_is_equal_on_every_rank(pool3):
    first, *others = pool3.run(same_everywhere)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(torch.from_numpy(first[index]), torch.from_numpy(other[index])) for index in first)


def frozen_state(rank, world, update):
    """An optimizer may have state of parameters that are not trained: Adagrad makes its own at once."""
    adagrad = (optim.Adagrad, {"lr": 0.05})
    plain, plain_opt = test_state.training.build("Frozen", adagrad, {})
    model, opt = test_state.training.build("Frozen", adagrad, {})
    engine = test_state.dear.attach(model, opt, update=update, **test_state.SMALL)
    for number in (0, 1):
        test_state.steps(plain, plain_opt, rank, range(3 * number, 3 * number + 3))
        test_state.steps(model, opt, rank, range(3 * number, 3 * number + 3))
        state = engine.state_dict()
        test_state.same_optimizer(state["optimizer"], plain_opt.state_dict())
        engine.load_state_dict(test_state.through_file(state))
    engine.detach()
    test_state.same_optimizer(opt.state_dict(), plain_opt.state_dict())


@pytest.mark.parametrize("update", ["sharded", "owned"])
def test_state_of_parameters_that_are_not_trained(pool2, update):
    pool2.run(frozen_state, update)
