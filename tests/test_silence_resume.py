"""A resumed run is the run that would have been, bit for bit, in every mode and at every world size up to four."""

from collections.abc import Iterator

import models
import pytest
import torch
import training
from compressing import KINDS
from silence import check_told, known, told
from torch.nn.parallel import DistributedDataParallel as DDP
from workers import WorkerPool

import dear

ADAM = (torch.optim.AdamW, {"lr": 0.01})
MOMENTUM = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})
MODES = {"sharded": None, "replicated": None, **KINDS}
STEPS = 4  # after the break


@pytest.fixture(scope="module")
def pool3() -> Iterator[WorkerPool]:
    """Three warm workers: sums of three numbers depend on their order."""
    with WorkerPool(3) as pool:
        yield pool


def start(mode, optimizer, seed, ddp):
    torch.manual_seed(seed)
    net = models.Mlp()
    model = DDP(net, **ddp)
    opt = optimizer[0](net.parameters(), **optimizer[1])
    compressor = KINDS[mode](min_compression_ratio=0.2) if mode in KINDS else None
    update = "replicated" if compressor is not None else mode
    return model, opt, dear.attach(model, opt, compressor=compressor, update=update, bucket_cap_mb=0.002)


@told
def resumed(rank, world, mode, optimizer, breaks, ddp):
    """Breaks after so many steps; the rest is trained by the same job and by a new one, which must agree."""
    for before in breaks:
        model, opt, engine = start(mode, optimizer, 0, ddp)
        for step in range(before):
            training.plain_step(model, opt, rank, step)
        saved = training_state(model, engine)
        want = [training.plain_step(model, opt, rank, step) for step in range(before, before + STEPS)]
        final = training_state(model, engine)["model"]
        engine.detach()

        model, opt, engine = start(mode, optimizer, 99, ddp)
        model.load_state_dict(saved["model"])
        engine.load_state_dict(saved["engine"])
        have = [training.plain_step(model, opt, rank, step) for step in range(before, before + STEPS)]
        for name, value in training_state(model, engine)["model"].items():
            assert torch.equal(value, final[name]), (before, name, float((value - final[name]).abs().max()))
        assert have == want, before
        engine.detach()


def training_state(model, engine):
    """What a checkpoint holds, in memory of its own."""
    import copy

    return copy.deepcopy({"model": model.state_dict(), "engine": engine.state_dict()})


class Alternating(models.Mlp):
    """Gradients come in another order from pass to pass."""

    turned = False

    def forward(self, x):
        first, second = (self.third, self.second) if self.turned else (self.second, self.third)
        return self.last(torch.tanh(second(torch.tanh(first(torch.tanh(self.first(x)))))))

    def __init__(self):
        super().__init__()
        self.third = torch.nn.Linear(37, 37)


NETS = {
    "alternating": (Alternating, {}),
    "static": (models.StaticallyUnused, {"static_graph": True}),
    "unused": (models.StaticallyUnused, {"find_unused_parameters": True}),
}


def start_of(net, update, seed):
    torch.manual_seed(seed)
    kind, ddp = NETS[net]
    model = DDP(kind(), **ddp)
    opt = MOMENTUM[0](model.parameters(), **MOMENTUM[1])
    return model, opt, dear.attach(model, opt, update=update, bucket_cap_mb=0.002)


@told
def resumed_in_order(rank, world, net, update, warm):
    """The job's first pass has another order of gradients than that of the job that it continues; ``warm``: it has
    trained some steps before it loads."""
    model, opt, engine = start_of(net, update, 0)
    steps = 6
    for step in range(steps):
        if step == 2:
            saved = training_state(model, engine)
        model.module.turned = step >= 2
        training.plain_step(model, opt, rank, step)
    final = training_state(model, engine)
    engine.detach()

    model, opt, engine = start_of(net, update, 99)
    model.module.turned = True
    for step in range(warm):
        training.plain_step(model, opt, rank, 50 + step)
    model.load_state_dict(saved["model"])
    engine.load_state_dict(saved["engine"])
    assert engine.state_dict()["bucket_order"] == saved["engine"]["bucket_order"]
    for step in range(2, steps):
        training.plain_step(model, opt, rank, step)
    have = training_state(model, engine)
    assert have["engine"]["bucket_order"] == final["engine"]["bucket_order"]
    for name, value in have["model"].items():
        assert torch.equal(value, final["model"][name]), name
    engine.detach()


@pytest.mark.parametrize("warm", [0, 1, 2])
@pytest.mark.parametrize("update", ["sharded", "replicated"])
@pytest.mark.parametrize("net", NETS)
def test_a_resumed_run_keeps_the_order_of_the_buckets(pool3, net, update, warm):
    check_told(pool3, resumed_in_order, net, update, warm)


def layouts(rank, world, update):
    """How many layouts a few steps bring."""
    model, opt, engine = start(update, MOMENTUM, 0, {})
    seen = []
    for step in range(4):
        training.plain_step(model, opt, rank, step)
        seen.append(engine._attached.layout)
    engine.detach()
    return all(layout is seen[0] for layout in seen) and len(seen[0].buckets) > 1


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_the_first_layout_is_the_last_one(pool2, update):
    assert all(pool2.run(layouts, update))


CASES = [
    known(f"resume-{mode}-{world}-{name}", mode, world, optimizer, ddp)
    for world in (2, 3, 4)
    for mode in MODES
    for name, optimizer, ddp in [("adam", ADAM, {}), ("momentum", MOMENTUM, {"gradient_as_bucket_view": True})]
    if mode not in KINDS or (name == "adam") == (world == 3)
]


@pytest.mark.parametrize(("mode", "world", "optimizer", "ddp"), CASES)
def test_a_resumed_run_is_the_run_that_would_have_been(request, mode, world, optimizer, ddp):
    check_told(request.getfixturevalue(f"pool{world}"), resumed, mode, optimizer, (1, 2, 5), ddp)
