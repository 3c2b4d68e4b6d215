"""What changes with the step: ranks and densities, and when compression begins."""

import pytest
import torch
from compressing import SHAPES, Prescribed, attach, backward, gradients, kept
from place import place
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear

STEPWISE = {
    "acp": lambda **o: compress.ACPSGD(rank=[(0, 8), (3, 2), (6, 5)], **o),
    "power": lambda **o: compress.PowerSGD(rank=[(0, 8), (3, 2), (6, 5)], **o),
    "local": lambda **o: compress.LocalPowerSGD(rank=[(0, 8), (3, 2), (6, 5)], **o),
    "topk": lambda **o: compress.TopK(density=[(0, 0.2), (3, 0.02), (6, 0.1)], **o),
    "threshold": lambda **o: compress.TopK(
        density=[(0, 0.9), (3, 0.5), (6, 0.8)], selection="threshold", min_compression_ratio=0.1, **o
    ),
}


def stepwise(rank: int, world: int, kind: str) -> None:
    """Bytes follow the list, nothing is lost at a change, and a state saved anywhere goes on bit for bit."""
    compressor = STEPWISE[kind]()
    model = attach(compressor)
    given = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    sent, states, results = [], [], []
    for step in range(9):
        states.append(compressor.state_dict(gather=True))
        have = backward(model, gradients(rank, step))
        results.append(have)
        sent.append(compressor.stats()["bytes_sent"])
        for name in SHAPES:
            given[name] += sum(gradients(r, step)[name].double() for r in range(world)) - world * have[name].double()
        for name, error in kept(compressor).items():
            assert (given[name].flatten() - error).abs().max() < 1e-3
    many, few, some = (max(sent[begin : begin + 3]) for begin in (0, 3, 6))
    assert few < some < many
    for begin in (2, 3, 5, 7):
        again = STEPWISE[kind]()
        again.load_state_dict(states[begin])
        resumed = attach(again)
        for step in range(begin, 9):
            have = backward(resumed, gradients(rank, step))
            assert all(torch.equal(have[name], results[step][name]) for name in SHAPES), (begin, step)


@pytest.mark.parametrize("kind", STEPWISE)
def test_ranks_and_densities_by_step(pool2, kind):
    pool2.run(stepwise, kind)


def steady(rank: int, step: int) -> dict[str, torch.Tensor]:
    """Gradients of a few directions that last, and noise: as after a warm-up."""
    lasting, passing = torch.Generator().manual_seed(5), torch.Generator().manual_seed(100 * step + rank)
    signal = torch.randn(300, 3, generator=lasting) @ torch.randn(3, 50, generator=lasting)
    return {"first": signal + 0.3 * torch.randn(300, 50, generator=passing)}


def learned_at_the_switch(rank: int, world: int, kind: str) -> None:
    """The first compressed step says what matters, and Adam's second moment sees no bump."""
    make = {"acp": compress.ACPSGD, "power": compress.PowerSGD, "local": compress.LocalPowerSGD}[kind]
    start, moments, vnmse = 6, [], []
    compressor = make(rank=4, start_step=start)
    model = attach(compressor, net=Prescribed({"first": (300, 50)}))
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.9))
    for step in range(start + 8):
        compressor.measure()
        backward(model, steady(rank, step))
        optimizer.step()
        vnmse.append(compressor.stats()["vnmse"])
        moments.append(float(optimizer.state[model.module.first]["exp_avg_sq"].sum()) / (1 - 0.9 ** (step + 1)))
    assert max(vnmse[:start]) < 1e-9
    assert vnmse[start] < 0.05, vnmse
    assert max(moments[start:]) < 1.02 * moments[start - 1], moments


@pytest.mark.parametrize("kind", ["acp", "power", "local"])
def test_the_switch_from_dense_is_no_jump(pool2, kind):
    pool2.run(learned_at_the_switch, kind)


def after_the_warmup(rank: int, world: int, schedule: str, resume_at: int | None) -> None:
    """Compression begins two steps after the learning rate has risen for the last time, also in a resumed run."""
    lambdas = {
        "linear": lambda t: min(1.0, (t + 1) / 5), "constant": lambda t: 1.0, "by epoch": lambda t: min(1.0, t / 2),
        "falls": lambda t: max(0.2, 0.5 - t / 10),
    }  # fmt: skip
    # linear: steps 0 to 4 rise, step 5 does not, step 6 is learned from; by epoch: steps 3 and 6 rise
    first = {"linear": 7, "constant": 3, "by epoch": 9, "falls": 3}[schedule]
    epoch = 3 if schedule == "by epoch" else 1  # steps

    def make() -> tuple[DDP, compress.PowerSGD, torch.optim.Optimizer, dear.Engine]:
        compressor = compress.PowerSGD(rank=2, start_step="warmup")
        model = DDP(Prescribed().to(place()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, compressor, optimizer, dear.attach(model, optimizer, compressor=compressor)

    model, compressor, optimizer, engine = make()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambdas[schedule])
    compressed = []
    for step in range(10):
        if step == resume_at:
            state, held = engine.state_dict(), compressor.state_dict(gather=True)
            weights = {name: value.clone() for name, value in model.module.state_dict().items()}
            engine.detach()
            model, compressor, optimizer, engine = make()
            model.module.load_state_dict(weights)
            engine.load_state_dict(state)
            compressor.load_state_dict(held)
            optimizer.param_groups[0]["initial_lr"] = 0.1
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambdas[schedule], last_epoch=step - 1)
        model({name: grad.to(place()) for name, grad in gradients(rank, step).items()}).backward()
        optimizer.step()
        if (step + 1) % epoch == 0:
            scheduler.step()
        optimizer.zero_grad()
        compressed.append(compressor.stats()["error_norm"] > 0)
    assert compressed == [step >= first for step in range(10)], compressed
    engine.detach()


@pytest.mark.parametrize("resume_at", [None, 5, 8])
def test_compression_begins_after_the_warmup(pool2, resume_at):
    pool2.run(after_the_warmup, "linear", resume_at)


def test_a_warmup_by_epoch_lasts_until_its_end(pool2):
    pool2.run(after_the_warmup, "by epoch", None)


@pytest.mark.parametrize("schedule", ["constant", "falls"])
def test_a_learning_rate_that_never_rises_has_no_warmup(pool2, schedule):
    pool2.run(after_the_warmup, schedule, None)


def without_an_optimizer(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match='start_step="warmup" needs the optimizer'):
        attach(compress.ACPSGD(start_step="warmup"))


def test_a_plain_hook_knows_no_warmup(pool2):
    pool2.run(without_an_optimizer)
