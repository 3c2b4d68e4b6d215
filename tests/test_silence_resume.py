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
