"""Any parameters, in any groups and buckets, laid out in any way: trained and saved as by plain DDP, bit for bit."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from silence import known
from torch import nn, optim
from torch.nn.parallel import DistributedDataParallel as DDP

import dear

#: A parameter: its shape, whether its memory is transposed, its optimizer group (None: no optimizer has it).
PARAMETER = st.tuples(
    st.one_of(
        st.just(()),
        st.tuples(st.integers(1, 40)),
        st.tuples(st.integers(1, 20), st.integers(1, 20)),
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    ),
    st.booleans(),
    st.sampled_from([0, 0, 0, 1, 1, 2, None]),
)
PARAMETERS = st.lists(PARAMETER, min_size=2, max_size=9).filter(
    lambda all_: any(group is not None for _, _, group in all_)
)
KINDS = [
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {"foreach": False}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
    ("Adagrad", {}),
    ("NAdam", {}),
    ("Adadelta", {}),
    ("ASGD", {"t0": 1}),
]
OPTIONS = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "update": st.sampled_from(["sharded", "replicated"]),
        "cap": st.sampled_from([0.0002, 0.001, 0.01]),  # MiB
        "ddp": st.sampled_from([{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}]),
        "saved_at": st.integers(0, 3),
    }
)


class Net(nn.Module):
    """Parameters of given shapes and layouts; every one counts in the output."""

    def __init__(self, parameters):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for index, (shape, transposed, _) in enumerate(parameters):
            value = torch.randn(shape, generator=generator)
            if transposed and value.dim() > 1:
                value = value.transpose(0, 1).contiguous().transpose(0, 1)
            self.register_parameter(f"p{index}", nn.Parameter(value))

    def forward(self, x):
        return torch.stack([(torch.tanh(p * x).sum() - x).square() for p in self.parameters()]).sum()


def build(parameters, options):
    """A DDP module and an optimizer with up to three groups."""
    net = Net(parameters)
    model = DDP(net, **options["ddp"])
    params = list(net.parameters())
    groups = [
        {"params": [p for p, (_, _, of) in zip(params, parameters, strict=True) if of == number], "lr": rate}
        for number, rate in enumerate((0.01, 0.02, 0.005))
    ]
    kind, extra = options["kind"]
    return model, getattr(optim, kind)([group for group in groups if group["params"]], lr=0.01, **extra)


def step(model, optimizer, rank, number):
    model(torch.tensor(0.1 * number + 0.37 * rank + 0.05)).backward()
    optimizer.step()
    model.zero_grad()


def same(have, want):
    """Two optimizer states, bit for bit, memory layout aside."""
    assert have["param_groups"] == want["param_groups"]
    assert have["state"].keys() == want["state"].keys()
    for index, state in want["state"].items():
        assert have["state"][index].keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(have["state"][index][key]), torch.as_tensor(value)), (index, key)


def trained(rank, world, parameters, options):
    """Losses are not compared, parameters and full state are: after every step, after loading, and after detaching."""
    plain, plain_opt = build(parameters, options)
    model, opt = build(parameters, options)
    engine = dear.attach(model, opt, update=options["update"], bucket_cap_mb=options["cap"])
    for number in range(options["saved_at"]):
        step(plain, plain_opt, rank, number)
        step(model, opt, rank, number)
    saved = copy.deepcopy(engine.state_dict()["optimizer"])
    same(saved, plain_opt.state_dict())
    engine.load_state_dict({"optimizer": copy.deepcopy(saved)})
    same(engine.state_dict()["optimizer"], saved)
    for number in range(options["saved_at"], options["saved_at"] + 2):
        step(plain, plain_opt, rank, number)
        step(model, opt, rank, number)
    for (name, have), want in zip(model.module.named_parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(have, want), name
    engine.detach()
    same(opt.state_dict(), plain_opt.state_dict())


@examples(60)
@given(parameters=PARAMETERS, options=OPTIONS)
def test_any_layout_trains_and_saves_as_plain_ddp(pool2, parameters, options):
    pool2.run(trained, parameters, options)


@pytest.mark.parametrize("update", [known(f"empty-{update}", update) for update in ("sharded", "owned", "replicated")])
def test_a_parameter_without_elements(pool2, update):
    options = {"kind": KINDS[0], "update": update, "cap": 0.001, "ddp": {}, "saved_at": 1}
    pool2.run(trained, [((3, 4), False, 0), ((0,), False, 0), ((0, 5), False, 1), ((2,), False, 1)], options)


def across_worlds(rank, world, parameters, options, state):
    """A state goes in and comes out as it was, whatever the number of ranks that share it."""
    model, opt = build(parameters, options)
    engine = dear.attach(model, opt, update=options["update"], bucket_cap_mb=options["cap"])
    for number in range(2):
        step(model, opt, rank, number)
    if state is not None:
        engine.load_state_dict({"optimizer": copy.deepcopy(state)})
        same(engine.state_dict()["optimizer"], state)
    out = copy.deepcopy(engine.state_dict()["optimizer"])
    engine.detach()
    return out


@pytest.mark.slow
@examples(12)
@given(parameters=PARAMETERS, options=OPTIONS)
def test_a_state_travels_between_world_sizes(pool2, pool4, parameters, options):
    state = pool2.run(across_worlds, parameters, options, None)[0]
    pool4.run(across_worlds, parameters, options, state)
