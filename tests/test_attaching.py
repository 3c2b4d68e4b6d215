"""What ``dear.attach()`` is given: wrappers of optimizers, replicas that differ already, a model that grows later."""

from collections import OrderedDict

import pytest
import torch
import training
from holding import SMALL
from machine.case import Case
from silence import check, check_told, pieces, told
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear

STEPS = 4
both_modes = pytest.mark.parametrize("update", ["sharded", "replicated"])


class Named(optim.Optimizer):
    """An optimizer in name only, as Accelerate's: ``Optimizer.__init__()`` was never called."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


class Hooked(Named):
    """The same, with what is needed for hooks of its own step, as pytorch_optimizer's Magma."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()


class HalfMade(optim.Optimizer):
    """Has the hooks of a step, and holds no optimizer in ``.optimizer``, as some of Lookahead."""

    def __init__(self, base):
        self.base, self.param_groups, self.state = base, base.param_groups, base.state
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()


class Holder:
    """Holds an optimizer and is none, as Lightning's."""

    step, zero_grad = Named.step, Named.zero_grad

    def __init__(self, optimizer):
        self.optimizer = optimizer


WRAPPERS = {"named": Named, "hooked": Hooked, "holder": Holder, "both": lambda optimizer: Holder(Named(optimizer))}


@told
def wrapped(rank, world, update):
    want = training.train(rank, "Mlp", steps=STEPS)
    for name, wrap in WRAPPERS.items():
        model, opt = training.build("Mlp", training.SGD, {})
        wrapper = wrap(opt)
        engine = dear.attach(model, wrapper, update=update, **SMALL)
        losses = [training.plain_step(model, wrapper, rank, step) for step in range(STEPS)]
        assert losses == want[0], name
        for key, value in model.module.state_dict().items():
            assert torch.equal(value, want[1][key]), (name, key)
        engine.detach()
    net = nn.Linear(2, 2)
    for empty in (Named(None), HalfMade(optim.SGD(net.parameters(), lr=0.1))):
        with pytest.raises(TypeError, match=r"holds none in \.optimizer: pass the optimizer inside\.$"):
            dear.attach(DDP(net), empty)


@both_modes
def test_a_wrapper_of_an_optimizer_is_unwrapped(pool2, update):
    check_told(pool2, wrapped, update)


@told
def apart(rank, world):
    model, opt = training.build("Mlp", training.SGD, {})
    with torch.no_grad():
        model.module.second.weight[3, 4] += 1e-3 * rank
    with pytest.raises(ValueError, match=r"Ranks 0 and 1 disagree on the values of the parameter second\.weight"):
        dear.attach(model, opt, update="sharded", **SMALL)
    with torch.no_grad():
        model.module.second.weight[3, 4] -= 1e-3 * rank
        torch.distributed.broadcast(model.module.second.weight, 0)
    dear.attach(model, opt, update="sharded", **SMALL).detach()


def test_replicas_that_differ_are_refused(pool2):
    check_told(pool2, apart)


@told
def states_apart(rank, world, update):
    """As where one rank alone has loaded its optimizer's checkpoint."""
    model, opt = training.build("Mlp", (torch.optim.AdamW, {"lr": 0.01}), {})
    training.plain_step(model, opt, rank, 0)
    if rank == 1:
        opt.state[model.module.second.weight]["exp_avg"].add_(1e-3)
    with pytest.raises(ValueError, match=r"Ranks 0 and 1 disagree on the optimizer's exp_avg of second\.weight"):
        dear.attach(model, opt, update=update, **SMALL)
    if rank == 1:
        opt.state.clear()
    with pytest.raises(ValueError, match=r"Ranks 0 and 1 disagree on the optimizer's step of"):
        dear.attach(model, opt, update=update, **SMALL)
    opt.state.clear()
    dear.attach(model, opt, update=update, **SMALL).detach()


@told
def odd_states(rank, world, update):
    """What optimizers keep beside tensors of one parameter is not compared."""
    model, opt = training.build("Mlp", (torch.optim.AdamW, {"lr": 0.01}), {})
    training.plain_step(model, opt, rank, 0)
    state = opt.state[model.module.second.weight]
    state |= {"last": float("nan"), "own": float(rank), "meta": torch.empty(2, device="meta")}
    state["sparse"] = torch.zeros(2).to_sparse()
    opt.state["whole"] = torch.zeros(3)
    if rank == 1:
        state["exp_avg"].add_(1e-3)
    with pytest.raises(ValueError, match=r"Ranks 0 and 1 disagree on the optimizer's exp_avg of second\.weight"):
        dear.attach(model, opt, update=update, **SMALL)


@pytest.mark.parametrize("update", ["sharded", "owned"])
def test_odd_states_are_left_alone(pool2, update):
    check_told(pool2, odd_states, update)


@told
def one_steps_first(rank, world, update):
    """As a checkpointing library that makes a state on one rank: nobody waits for the other."""
    model, opt = training.build("Mlp", (torch.optim.AdamW, {"lr": 0.0, "weight_decay": 0.0}), {})
    engine = dear.attach(model, opt, update=update, check_replicas=0, **SMALL)
    if rank == 0:
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        opt.step()
    opt.zero_grad()
    training.loss_of(model, rank, 0).backward()
    opt.step()
    engine.detach()


@pytest.mark.parametrize("update", ["sharded", "owned"])
def test_one_rank_may_step_before_the_first_pass(pool2, update):
    check_told(pool2, one_steps_first, update)


@pytest.mark.parametrize("update", ["sharded", "owned"])
def test_optimizers_whose_state_differs_are_refused(pool2, update):
    check_told(pool2, states_apart, update)


@told
def first_pass_without_sync(rank, world, update):
    model, opt = training.build("StaticallyUnused", training.SGD, {"static_graph": True})
    training.plain_step(model, opt, rank, 0)
    engine = dear.attach(model, opt, update=update, **SMALL)
    with (
        model.no_sync(),
        pytest.raises(RuntimeError, match=r"the first pass after dear\.attach\(\) must not run under"),
    ):
        model(training.models.data(rank, 1)[0])
    training.plain_step(model, opt, rank, 1)
    with model.no_sync():
        training.loss_of(model, rank, 2).backward()
    training.plain_step(model, opt, rank, 3)
    engine.detach()


@told
def first_registered_pass_without_sync(rank, world):
    model, opt = training.build("StaticallyUnused", training.SGD, {"static_graph": True})
    compress.register(model, compress.PowerSGD(rank=2))
    with model.no_sync(), pytest.raises(RuntimeError, match=r"after compress\.register\(\) must not run under"):
        model(training.models.data(rank, 1)[0])
    training.plain_step(model, opt, rank, 1)
    with model.no_sync():
        training.loss_of(model, rank, 2).backward()
    training.plain_step(model, opt, rank, 3)


def test_a_first_registered_pass_that_teaches_nothing_is_refused(pool2):
    check_told(pool2, first_registered_pass_without_sync)


@both_modes
def test_a_static_graph_is_learned_in_an_ordinary_pass(pool2, update):
    check_told(pool2, first_pass_without_sync, update)


@told
def grown(rank, world, update):
    """Plain DDP does not know what came into the model later."""
    finals = []
    for kind in ("plain", update):
        model, opt = training.build("Mlp", training.SGD, {})
        training.plain_step(model, opt, rank, 0)
        engine = dear.attach(model, opt, update=kind, **SMALL) if kind != "plain" else None
        training.plain_step(model, opt, rank, 1)
        model.module.extra = nn.Linear(3, 3)
        training.plain_step(model, opt, rank, 2)
        if engine is not None:
            engine.detach()
        training.plain_step(model, opt, rank, 3)
        finals.append([param.detach() for name, param in model.module.named_parameters() if "extra" not in name])
    assert all(map(torch.equal, *finals))


@both_modes
def test_a_module_that_comes_later_is_left_alone(pool2, update):
    check_told(pool2, grown, update)


def test_a_first_pass_after_detach_that_teaches_nothing_is_refused(pool2):
    """Torch would end it by an assertion."""
    program = "attach()\n\ntrain(0)\n\ndetach()\n\nwith model.no_sync(): forward(1).backward()\nforward(2).backward()"
    case = Case("replicated", "StaticallyUnused", ddp={"static_graph": True}, program=pieces(program))
    check(pool2, case, may_refuse=True)
    case = case.with_program([*pieces("attach()\n\ntrain(0)\n\ndetach()\n\ntrain(1)"), *case.program[-1:]])
    check(pool2, case, may_refuse=False)
