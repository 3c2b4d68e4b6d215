"""What Eva and its like keep and send, and what they refuse."""

import gc
import logging

import pytest
import torch
import torch.nn.functional as F
from place import place
from test_eva import KINDS, OPTIONS, build, data
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import dear
import precondition
from benchmarks.training.gpt import GPT
from benchmarks.training.workloads import WORKLOADS
from precondition import FOOF, Eva


def attached(kind, **options):
    model = DDP(build().to(place()), bucket_cap_mb=0.001)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    engine = dear.attach(model, optimizer, preconditioner=KINDS[kind](**OPTIONS[1]), bucket_cap_mb=0.001, **options)
    return model, optimizer, engine


def step(model, optimizer, rank, number, drop=False):
    x, y = (each.to(place()) for each in data(rank, number))
    F.mse_loss(model(x), y).backward()
    if not drop:
        optimizer.step()
    optimizer.zero_grad()


def resumed(rank, world, kind, update):
    """A run that stops and goes on is the run that goes on."""
    model, optimizer, engine = attached(kind, update=update)
    for number in range(2):
        step(model, optimizer, rank, number)
    saved = {"net": {k: v.clone() for k, v in model.module.state_dict().items()}, "engine": engine.state_dict()}
    for number in range(2, 4):
        step(model, optimizer, rank, number)
    want = [param.clone() for param in model.parameters()]
    model, optimizer, engine = attached(kind, update=update)
    model.module.load_state_dict(saved["net"])
    engine.load_state_dict(saved["engine"])
    for number in range(2, 4):
        step(model, optimizer, rank, number)
    for have, expected in zip(model.parameters(), want, strict=True):
        assert torch.equal(have, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit(pool2, kind):
    pool2.run(resumed, kind, "sharded")


def dropped(rank, world):
    """A batch whose gradients are given up leaves nothing behind."""
    states = []
    for drop in (False, True):
        model, optimizer, engine = attached("eva")
        step(model, optimizer, rank, 0)
        if drop:
            step(model, optimizer, rank, 5, drop=True)
        step(model, optimizer, rank, 1)
        states.append(engine.state_dict(optimizer=False)["preconditioner"]["layers"])
    for name, want in states[0].items():
        for vector, value in want.items():
            torch.testing.assert_close(states[1][name][vector], value, rtol=1e-12, atol=1e-14)


def test_gradients_that_are_given_up(pool2):
    pool2.run(dropped)


class Branches(nn.Module):
    """Two layers of which a pass takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, which):
        return (self.second if which else self.first)(x)


def unused(rank, world):
    """A layer counts on the ranks that use it; what is not finite on any rank is never learnt."""
    torch.manual_seed(0)
    model = DDP(Branches().to(place()), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    eva = Eva(factor_decay=0.0)
    precondition.register(model, optimizer, eva)

    def learn(which, x):
        optimizer.zero_grad()
        model(x, which).sum().backward()
        eva.step()
        layers = eva.state_dict()["layers"]
        return {name: {kind: mean.cpu() for kind, mean in means.items()} for name, means in layers.items()}

    x = torch.full((2, 4), 3.0 + rank, device=place())
    assert learn(False, x).keys() == {"first"}
    known = learn(rank == 1, x)
    torch.testing.assert_close(known["first"]["a"], torch.full((1, 4), 3.0))
    torch.testing.assert_close(known["second"]["a"], torch.full((1, 4), 4.0))
    torch.testing.assert_close(known["second"]["b"], torch.full((3,), 2.0 / world))  # as the averaged gradient
    infinite = torch.full((2, 4), torch.inf if rank else 5.0, device=place())
    after = learn(False, infinite)
    torch.testing.assert_close(after["first"]["a"], known["first"]["a"])  # such a step is skipped
    with model.module.first.weight.register_hook(torch.zeros_like):
        after = learn(False, infinite)
    torch.testing.assert_close(after["first"]["a"], torch.full((1, 4), 5.0))
    torch.testing.assert_close(after["second"]["a"], known["second"]["a"])
    after = learn(False, torch.full((2, 4), torch.nan, device=place()))
    assert all(value.isfinite().all() for layer in after.values() for value in layer.values())
    for param in model.parameters():
        param.grad = None
    model(x, False).mul(0).sum().backward()  # gradients of zero stay zero
    eva.step()
    assert not model.module.first.weight.grad.any()


def test_layers_that_are_not_used_and_values_that_are_not_finite(pool2):
    pool2.run(unused)


def bytes_and_tensors(rank, world, name, layers, message):
    """What Eva adds to a step's bytes, and to what a run keeps."""
    found = []
    for kind in (None, Eva):
        gc.collect()
        torch.manual_seed(0)
        net = GPT(layers=layers) if name == "gpt" else WORKLOADS[name].build()
        model = DDP(net, gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        engine = dear.attach(model, optimizer, preconditioner=kind() if kind else None)
        where = {"rank": rank, "world": world, "batch": 1, "seed": 1}
        sent = []
        for number in range(3):
            inputs, targets = WORKLOADS[name].data().batch(number, **where)
            loss = WORKLOADS[name].loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.synchronize()
            stats = engine.stats()
            sent.append(stats["bytes_sent"] + stats.get("preconditioner_bytes_sent", 0))
        del loss, inputs, targets
        gc.collect()
        kept = {
            each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
            for each in gc.get_objects()
            if type(each) in (torch.Tensor, nn.Parameter) and each.device.type == "cpu"  # not those of a compiler
        }
        found.append((sent[2] - sent[1], sum(kept.values())))
        size = sum(param.nbytes for param in net.parameters())
        engine.detach()
        del engine, optimizer, model, net
    (plain, before), (with_eva, after) = found
    return with_eva - plain, after - before, size


@pytest.mark.parametrize(("name", "layers"), [("gpt", 1), ("digits", 0)])
def test_memory_and_bytes_are_few(pool2, name, layers):
    told = pool2.run(bytes_and_tensors, name, layers, None)
    net = GPT(layers=layers) if name == "gpt" else WORKLOADS[name].build()
    served = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    vectors = sum(m.weight.shape[0] + m.weight[0].numel() for m in served)
    for extra, kept, size in told:
        # One average of the vectors and a flag a layer, and two numbers a layer to the other rank.
        assert extra == 4 * (vectors + len(served)) + 4 * 2 * len(served)
        assert 4 * vectors <= kept < size / 100


def refused(rank, world):
    with pytest.raises(ValueError, match="damping must be a positive number"):
        Eva(damping=0)
    with pytest.raises(ValueError, match="factor_decay must be"):
        Eva(factor_decay=1)
    with pytest.raises(ValueError, match="kl_clip must be"):
        Eva(kl_clip=-1)
    with pytest.raises(RuntimeError, match="needs a model"):
        Eva().step()
    model = DDP(build())
    weights = [param for name, param in model.named_parameters() if name.endswith("weight")]
    biases = [param for name, param in model.named_parameters() if name.endswith("bias")]
    optimizer = torch.optim.SGD([{"params": weights}, {"params": biases}], lr=0.1)
    for put in (
        lambda eva: dear.attach(model, optimizer, preconditioner=eva),
        lambda eva: precondition.register(model, optimizer, eva),
    ):
        with pytest.raises(ValueError, match=r"bias of images are in different groups"):
            put(Eva())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="every rank must call"):
        dear.attach(model, optimizer, preconditioner=Eva(damping=0.1 + rank))
    with pytest.raises(ValueError, match='update="replicated"'):
        dear.attach(model, optimizer, preconditioner=Eva(), update="replicated")
    norm = DDP(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="found no layer"):
        dear.attach(norm, torch.optim.SGD(norm.parameters(), lr=0.1), preconditioner=Eva())
    eva = Eva()
    with pytest.raises(ValueError, match="state of FOOF, not of Eva"):
        eva.load_state_dict(FOOF().state_dict())
    with pytest.raises(ValueError, match="has a layer 'other'"):
        eva.load_state_dict({"preconditioner": "Eva", "layers": {"other": {"a": torch.zeros(1, 2)}}})
        dear.attach(model, optimizer, preconditioner=eva)


def test_refusals(pool2):
    pool2.run(refused)


def left_out(rank, world):
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(4, 3), nn.Linear(3, 2)
            self.columns = nn.Linear(2, 3)
            self.columns.weight = nn.Parameter(torch.randn(2, 3).t())

        def forward(self, x):
            return self.columns(self.out(self.words(x)))

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("precondition._layers").addHandler(handler)
    model = DDP(Embedded())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = dear.attach(model, optimizer, preconditioner=Eva())
    for _ in range(2):
        model(torch.arange(4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert engine.stats()["preconditioned_layers"] == 1
    assert (
        lines == []
        if rank
        else ["These modules are not preconditioned, and left to the optimizer: words (Embedding), columns (Linear)."]
    )


def test_layers_left_to_the_optimizer_are_named_once(pool2):
    pool2.run(left_out)
