"""Several optimizers that step one after another, such as Muon for matrices and AdamW for the rest."""

import io

import owning
import pytest
import torch
import training
from holding import hold, release
from owning import Several
from torch import nn, optim
from training import SMALL

import dear

LARGE = {"bucket_cap_mb": 0.3}


def factored_and_adamw(params):
    """As Muon and AdamW, without the large factors that Muon makes of small differences."""
    params = list(params)
    return Several(
        owning.Factored([param for param in params if param.dim() == 2], lr=0.05),
        optim.AdamW([param for param in params if param.dim() != 2], lr=0.01),
    )


def sgd_and_adamw(params):
    params = list(params)
    return Several(optim.SGD(params[::2], lr=0.05, momentum=0.9), optim.AdamW(params[1::2], lr=0.01))


def build(kind, width=37, **ddp):
    torch.manual_seed(0)
    net = training.models.Mlp(width).to(training.place())
    model = nn.parallel.DistributedDataParallel(net, **ddp)
    return model, kind(net.parameters())


def values(model):
    return [param.detach().clone() for param in model.module.parameters()]


def trained(rank, kind, attach, step=training.plain_step, width=37, ddp=None, steps=6):
    """Losses and parameters after some steps; with the engine if ``attach`` is given."""
    model, several = build(kind, width, **(ddp or {}))
    engine = dear.attach(model, several.optimizers, **attach) if attach is not None else None
    losses = [step(model, several, rank, number) for number in range(steps)]
    after = values(model)
    if engine is not None:
        engine.detach()
    return losses, after


def compared(rank, kind, attach, exact=True, **options):
    want_losses, want = trained(rank, kind, None, **options)
    losses, have = trained(rank, kind, attach, **options)
    for mine, theirs in zip(have, want, strict=True):
        if exact:
            assert torch.equal(mine, theirs)
        else:
            torch.testing.assert_close(mine, theirs)
    assert losses == want_losses or not exact


def parity(rank, world, algorithms):
    for kind in (owning.muon_and_adamw, sgd_and_adamw):
        for attach in (*({**SMALL, "algorithm": each} for each in algorithms), {**SMALL, "overlap_forward": False}):
            compared(rank, kind, attach)
        compared(rank, kind, LARGE, width=200)
        compared(rank, kind, SMALL, ddp={"find_unused_parameters": True})


def test_the_same_training_as_plain_ddp(pool2):
    pool2.run(parity, ("ring", "native"))


def to_rounding(rank, world):
    for kind in (factored_and_adamw, sgd_and_adamw):
        for attach in (SMALL, {**SMALL, "algorithm": "native"}):
            compared(rank, kind, attach, exact=False)
        compared(rank, kind, LARGE, exact=False, width=200)


def test_to_rounding(pool1, pool3, pool4):
    for pool in (pool1, pool3, pool4):
        pool.run(to_rounding)


def chosen(rank, world):
    for kind, update in ((owning.muon_and_adamw, "owned"), (sgd_and_adamw, "sharded")):
        model, several = build(kind)
        with dear.attach(model, several.optimizers) as engine:
            assert engine.update == update


def test_what_is_chosen(pool2):
    pool2.run(chosen)


# --- training loops ---


def zeroed_apart(model, several, rank, number):
    """Each optimizer zeroes its gradients before the next one steps."""
    loss = training.loss_of(model, rank, number)
    loss.backward()
    for optimizer in several.optimizers[::-1]:
        optimizer.step()
        optimizer.zero_grad(set_to_none=number % 2 == 0)
    return loss.item()


def read_between(model, several, rank, number):
    """Rank 0 alone reads everything between the two steps, and after them."""
    loss = training.loss_of(model, rank, number)
    loss.backward()
    read = [loss.item()]
    for optimizer in several.optimizers:
        optimizer.step()
        if rank == 0:
            read += [param.double().sum().item() for param in model.module.parameters()]
    several.zero_grad()
    return read


def one_seldom(model, several, rank, number):
    """The second one steps every other time, with the gradients of both."""
    loss = training.loss_of(model, rank, number)
    loss.backward()
    several.optimizers[0].step()
    several.optimizers[0].zero_grad()
    if number % 2:
        several.optimizers[1].step()
        several.optimizers[1].zero_grad()
    return loss.item()


def twice(model, several, rank, number):
    """The first one steps twice on the same gradients, before and after the other."""
    loss = training.loss_of(model, rank, number)
    loss.backward()
    several.step()
    several.optimizers[0].step()
    several.zero_grad()
    return loss.item()


def accumulated(model, several, rank, number):
    with model.no_sync():
        training.loss_of(model, rank, 10 * number).backward()
    loss = training.loss_of(model, rank, 10 * number + 1)
    loss.backward()
    several.step()
    several.zero_grad()
    return loss.item()


def with_closures(model, several, rank, number):
    """The loss is evaluated by the first step."""

    def closure():
        several.zero_grad()
        loss = training.loss_of(model, rank, number)
        loss.backward()
        return loss

    loss = several.optimizers[0].step(closure)
    several.optimizers[1].step()
    return loss.item()


def written_between(model, several, rank, number):
    """Parameters of both are changed by the user between the steps."""
    loss = training.loss_of(model, rank, number)
    loss.backward()
    for optimizer in several.optimizers:
        optimizer.step()
        with torch.no_grad():
            for param in model.module.parameters():
                param.mul_(0.99)
    several.zero_grad()
    return loss.item()


LOOPS = [zeroed_apart, read_between, twice, accumulated, with_closures, written_between]


def loops(rank, world):
    for loop in LOOPS:
        compared(rank, owning.muon_and_adamw, SMALL, step=loop)
        compared(rank, owning.muon_and_adamw, {**SMALL, "algorithm": "native"}, step=loop)
    # DDP adds averages where here sums are averaged.
    compared(rank, factored_and_adamw, SMALL, step=one_seldom, exact=False)


def test_training_loops(pool2):
    pool2.run(loops)


def held_alias(rank, world):
    """A kept state_dict() follows the parameters, as in plain DDP, and a guest is copied to and fro."""

    def loop(model, several, rank, number):
        kept = model.module.state_dict()
        several_steps = training.plain_step(model, several, rank, number)
        return [several_steps, *(value.double().sum().item() for value in kept.values())]

    compared(rank, owning.muon_and_adamw, SMALL, step=loop)


def test_aliases(pool2):
    pool2.run(held_alias)


def early_read(rank, world):
    """Between the steps the first one's parameters are pending and the second one's stand: nobody reads too early."""
    model, several = build(owning.muon_and_adamw)
    plain, plain_several = build(owning.muon_and_adamw)
    dear.attach(model, several.optimizers, **SMALL)
    for number in range(3):
        training.plain_step(model, several, rank, number)
        training.plain_step(plain, plain_several, rank, number)
    for each, other in ((model, several), (plain, plain_several)):
        training.loss_of(each, rank, 3).backward()
        if each is model and rank == 1:
            hold("early")
        other.optimizers[0].step()
        if each is model and rank == 0:
            free = [param for param in model.module.parameters() if param.dim() != 2]
            assert all(type(param) is nn.Parameter for param in free), "the second one's parameters stand"
            pending = [param for param in model.module.parameters() if param.dim() == 2]
            assert all(type(param) is not nn.Parameter for param in pending)
            release("early")
    for mine, theirs in zip(values(model), values(plain), strict=True):
        assert torch.equal(mine, theirs)
    for other in (several, plain_several):
        other.optimizers[1].step()
    for mine, theirs in zip(values(model), values(plain), strict=True):
        assert torch.equal(mine, theirs)


def test_nobody_reads_too_early(pool2):
    pool2.run(early_read)


# --- state ---


def same_states(have, want):
    for one, other in zip(have, want, strict=True):
        assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
        for index, state in other["state"].items():
            assert state.keys() == one["state"][index].keys()
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(one["state"][index][key]), torch.as_tensor(value)), (index, key)


def resumed(rank, world, warm):
    plain, plain_several = build(owning.muon_and_adamw)
    want = [training.plain_step(plain, plain_several, rank, number) for number in range(8)]
    model, several = build(owning.muon_and_adamw)
    engine = dear.attach(model, several.optimizers, **SMALL)
    have = [training.plain_step(model, several, rank, number) for number in range(4)]
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "engine": engine.state_dict()}, file)
    engine.detach()
    file.seek(0)
    state = torch.load(file)

    torch.manual_seed(99)
    model = nn.parallel.DistributedDataParallel(training.models.Mlp().to(training.place()))
    several = owning.muon_and_adamw(model.parameters())
    engine = dear.attach(model, several.optimizers, **SMALL)
    for number in range(warm):
        training.plain_step(model, several, rank, 90 + number)
    model.load_state_dict(state["model"])
    engine.load_state_dict(state["engine"])
    have += [training.plain_step(model, several, rank, number) for number in range(4, 8)]
    assert have == want
    same_states(engine.state_dict()["optimizer"], [each.state_dict() for each in plain_several.optimizers])
    with pytest.raises(ValueError, match="The state is of 1 optimizers and the engine has 2"):
        engine.load_state_dict({"optimizer": plain_several.optimizers[0].state_dict()})
    # One of them loads by its own method.
    several.optimizers[1].load_state_dict(plain_several.optimizers[1].state_dict())
    training.plain_step(model, several, rank, 8)
    training.plain_step(plain, plain_several, rank, 8)
    for mine, theirs in zip(values(model), values(plain), strict=True):
        assert torch.equal(mine, theirs)
    engine.detach()
    same_states([each.state_dict() for each in several.optimizers], [o.state_dict() for o in plain_several.optimizers])


@pytest.mark.parametrize("warm", [0, 2])
def test_a_resumed_run_goes_on_bit_for_bit(pool2, warm):
    pool2.run(resumed, warm)


def state_of_one(rank, world):
    model, several = build(owning.muon_and_adamw)
    dear.attach(model, several.optimizers, **SMALL)
    for number in range(2):
        training.plain_step(model, several, rank, number)
    for optimizer in several.optimizers:
        with pytest.raises(RuntimeError, match=r"engine.state_dict\(\)"):
            optimizer.state_dict()
        with pytest.raises(RuntimeError, match="held in shards"):
            dict(optimizer.state)
    # What one forgets, the other keeps.
    several.optimizers[0].state.clear()
    state = model._dear_engine.state_dict()["optimizer"]
    assert not state[0]["state"] and state[1]["state"]


def test_each_has_a_state_of_its_own(pool2):
    pool2.run(state_of_one)


def clipped(rank, world):
    def step(model, several, rank, number):
        training.loss_of(model, rank, number).backward()
        engine = getattr(model, "_dear_engine", None)
        clip = engine.clip_grad_norm_ if engine else lambda m: torch.nn.utils.clip_grad_norm_(model.parameters(), m)
        norm = clip(0.05)
        several.step()
        several.zero_grad()
        return norm.item()

    compared(rank, factored_and_adamw, SMALL, step=step, exact=False)


def test_clipping_is_over_all_of_them(pool2):
    pool2.run(clipped)


def regrouped(rank, world):
    """Another size of the fusion groups, and a parameter more, while training goes on."""

    def loop(model, several, rank, number):
        engine = getattr(model, "_dear_engine", None)
        if engine and number in (2, 4):
            engine.bucket_cap_mb = 0.001 * number
        if number == 3:
            several.optimizers[1].add_param_group({"params": [model.module.last.bias], "lr": 0.3})
        loss = training.plain_step(model, several, rank, number)
        model.zero_grad()  # also of the parameter that nobody has yet
        return loss

    def without_one(params):
        return owning.muon_and_adamw(list(params)[:-1])

    compared(rank, without_one, SMALL, step=loop, steps=7)


def test_groups_change_while_training_goes_on(pool2):
    pool2.run(regrouped)


# --- refusals ---


def refused(rank, world):
    import compress

    model, several = build(owning.muon_and_adamw)
    with pytest.raises(ValueError, match="takes one optimizer, not 2"):
        dear.attach(model, several.optimizers, update="replicated")
    with pytest.raises(ValueError, match="takes one optimizer"):
        dear.attach(model, several.optimizers, compressor=compress.ACPSGD())
    with pytest.raises(ValueError, match="takes one optimizer"):
        dear.attach(model, [several.optimizers[1], optim.LBFGS([model.module.first.weight])])
    twice = [several.optimizers[0], optim.AdamW(model.parameters())]
    with pytest.raises(ValueError, match="is in two optimizers, which would update it twice: leave it in one"):
        dear.attach(model, twice)


def test_refusals(pool2):
    pool2.run(refused)
