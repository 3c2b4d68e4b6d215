"""The optimizer's full state by torch's own means, and checkpoints by torch.distributed.checkpoint."""

import copy
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
import training
from compressing import KINDS
from refusing import SMALL, final, refused, same, trains_on_like_plain, warm
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel as DDP

import dear
from dear.integrations.dcp import TrainingState

ADAM = (torch.optim.AdamW, {"lr": 0.01})
STATELESS = (torch.optim.SGD, {"lr": 0.05})


def optimizer_for(update):
    """With owned updates one that wants its parameters whole."""
    return (torch.optim.Adafactor, {"lr": 0.01}) if update == "owned" else ADAM


def start(rank, update, optimizer=ADAM, compressor=None, steps=3):
    model, opt = training.build("Mlp", optimizer, {})
    engine = dear.attach(model, opt, update=update, compressor=compressor, **SMALL)
    for step in range(steps):
        training.plain_step(model, opt, rank, step)
    return model, opt, engine


def plain(rank, optimizer=ADAM, steps=3):
    model, opt = training.build("Mlp", optimizer, {})
    for step in range(steps):
        training.plain_step(model, opt, rank, step)
    return model, opt


def equal(have, want):
    assert have.keys() == want.keys()
    for key, value in want.items():
        if isinstance(value, dict):
            equal(have[key], value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(have[key], value), key
        else:
            assert have[key] == value, key


def inside(rank, world, update):
    model, opt, engine = start(rank, update, optimizer_for(update))
    _, want = plain(rank, optimizer_for(update))
    with engine.full_state():
        if rank == 0:  # alone
            equal(opt.state_dict(), want.state_dict())
            assert len(copy.copy(opt.state)) == len(want.state)
    for step in range(3, 6):
        training.plain_step(model, opt, rank, step)
    same(final(model), final(plain(rank, optimizer_for(update), steps=6)[0]))
    if update != "replicated":
        with refused(RuntimeError, r"enter engine.full_state\(\) on every rank"):
            opt.state_dict()
    engine.detach()


@pytest.mark.parametrize("update", ["sharded", "replicated", "owned"])
def test_one_rank_saves_inside(pool2, update):
    pool2.run(inside, update)


def inside_compressed(rank, world, mode):
    """The state is that of a step with what the compressor sent, and training goes on as if nobody had looked."""
    model, opt, engine = start(rank, **setting(mode))
    other, other_opt, other_engine = start(rank, **setting(mode))
    with engine.full_state():
        have = copy.deepcopy(opt.state_dict())
        with pytest.raises(AssertionError):  # a compressor's state is not plain DDP's
            equal(have["state"], plain(rank)[1].state_dict()["state"])
    equal(have, other_engine.state_dict()["optimizer"])
    for step in range(3, 6):
        training.plain_step(model, opt, rank, step)
        training.plain_step(other, other_opt, rank, step)
    same(final(model), final(other))
    engine.detach()
    other_engine.detach()


@pytest.mark.parametrize("mode", ["power", "topk", "sign"])
def test_one_rank_saves_inside_with_a_compressor(pool2, mode):
    pool2.run(inside_compressed, mode)


def loaded(rank, world, update):
    _, saved = plain(rank, steps=5)
    _, opt, engine = start(rank, update, steps=2)
    with engine.full_state():
        opt.load_state_dict(saved.state_dict())
        equal(opt.state_dict(), saved.state_dict())
        equal(engine.state_dict()["optimizer"], saved.state_dict())
    equal(engine.state_dict()["optimizer"], saved.state_dict())
    engine.detach()
    equal(opt.state_dict(), saved.state_dict())

    _, opt, engine = start(rank, update, steps=2)
    with engine.full_state():
        for state in opt.state.values():
            state["exp_avg"].zero_()
    with engine.full_state():
        assert all(not state["exp_avg"].any() and state["exp_avg_sq"].any() for state in opt.state.values())
    engine.detach()


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_what_is_changed_inside_holds(pool2, update):
    pool2.run(loaded, update)


def stepped(rank, world, update):
    """A step ends it; so does an error inside."""
    model, opt, engine = start(rank, update)
    with engine.full_state():
        for step in range(3, 5):
            training.plain_step(model, opt, rank, step)
    with pytest.raises(KeyError), engine.full_state():
        raise KeyError
    training.plain_step(model, opt, rank, 5)
    with engine.full_state():
        for param in model.parameters():  # as torch.distributed.checkpoint makes state
            param.grad = torch.zeros_like(param)
        groups = [group["lr"] for group in opt.param_groups]
        for group in opt.param_groups:
            group["lr"] = 0.0
        if rank == 0:
            opt.step()
        opt.zero_grad()
        for group, lr in zip(opt.param_groups, groups, strict=True):
            group["lr"] = lr
    same(final(model), final(plain(rank, steps=6)[0]))
    engine.detach()


@pytest.mark.parametrize("update", ["sharded"])
def test_a_step_inside(pool2, update):
    pool2.run(stepped, update)


def before_training(rank, world):
    model, opt, engine = start(rank, "sharded", training.SGD, steps=0)
    with engine.full_state():
        assert opt.state_dict()["state"] == {}
    trains_on_like_plain(rank, model, opt, 0)
    engine.detach()
    model, opt, engine = warm(rank, "sharded")
    engine.detach()
    with engine.full_state():
        assert opt.state_dict()["state"]


def test_before_and_after_training(pool2):
    pool2.run(before_training)


# torch.distributed.checkpoint


def by_name(rank, world, update, optimizer):
    """get_state_dict() and set_state_dict() of torch, both ways between the library and plain DDP."""
    model, opt, engine = start(rank, update, optimizer)
    other, other_opt = plain(rank, optimizer)
    with engine.full_state():
        have = get_state_dict(model, opt)
    want = get_state_dict(other, other_opt)
    equal(have[0], want[0])
    equal(have[1]["state"], want[1]["state"])

    fresh, fresh_opt = plain(rank, optimizer, steps=0)
    set_state_dict(fresh, fresh_opt, model_state_dict=have[0], optim_state_dict=have[1])
    resumed, resumed_opt, resumed_engine = start(rank, update, optimizer, steps=1)
    with resumed_engine.full_state():
        set_state_dict(resumed, resumed_opt, model_state_dict=want[0], optim_state_dict=want[1])
    for step in range(3, 6):
        for pair in ((model, opt), (other, other_opt), (fresh, fresh_opt), (resumed, resumed_opt)):
            training.plain_step(*pair, rank, step)
    for each in (model, fresh, resumed):
        same(final(each), final(other))
    engine.detach()
    resumed_engine.detach()


BY_NAME = {
    "AdamW": ("sharded", ADAM),
    "momentum": ("sharded", training.SGD),
    "stateless": ("sharded", STATELESS),
    "replicated": ("replicated", ADAM),
    "owned": ("owned", optimizer_for("owned")),
}


@pytest.mark.parametrize("case", BY_NAME)
def test_states_by_name(pool2, case):
    pool2.run(by_name, *BY_NAME[case])


def by_name_compressed(rank, world, mode):
    """Plain DDP goes on with a compressed run's state, and a compressed run with plain DDP's."""
    model, opt, engine = start(rank, **setting(mode))
    with engine.full_state():
        have = copy.deepcopy(get_state_dict(model, opt))
    engine.detach()
    plain_model, plain_opt = plain(rank, steps=0)
    set_state_dict(plain_model, plain_opt, model_state_dict=have[0], optim_state_dict=have[1])
    for step in range(3, 6):  # both are plain DDP now
        training.plain_step(model, opt, rank, step)
        training.plain_step(plain_model, plain_opt, rank, step)
    same(final(model), final(plain_model))

    want = copy.deepcopy(get_state_dict(plain_model, plain_opt))
    resumed, resumed_opt, engine = start(rank, **setting(mode), steps=1)
    with engine.full_state():
        set_state_dict(resumed, resumed_opt, model_state_dict=want[0], optim_state_dict=want[1])
        again = get_state_dict(resumed, resumed_opt)
        equal(again[0], want[0])
        equal(again[1]["state"], want[1]["state"])
    training.plain_step(resumed, resumed_opt, rank, 6)
    engine.detach()


@pytest.mark.parametrize("mode", ["power", "topk", "sign"])
def test_states_by_name_with_a_compressor(pool2, mode):
    pool2.run(by_name_compressed, mode)


MODES = ["sharded", "replicated", "owned", "power", "topk", "sign"]


def setting(mode):
    compressor = KINDS[mode](min_compression_ratio=0.2) if mode in KINDS else None
    update = "replicated" if compressor else mode
    return {"update": update, "compressor": compressor, "optimizer": optimizer_for(update)}


def written(rank, world, mode, folder):
    """The steps that follow a checkpoint, in the run that wrote it."""
    model, opt, engine = start(rank, **setting(mode))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"training": TrainingState(model, opt, engine)}, checkpoint_id=folder)
    for step in range(3, 7):
        training.plain_step(model, opt, rank, step)
    result = final(model)
    engine.detach()
    return result


def read(rank, world, mode, folder, want, before):
    torch.manual_seed(7)
    model, opt, engine = start(rank, **setting(mode), steps=before)
    nn.init.zeros_(next(model.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"training": TrainingState(model, opt, engine)}, checkpoint_id=folder)
    for step in range(3, 7):
        training.plain_step(model, opt, rank, step)
    for name, value in final(model).items():
        if world == 2:
            assert torch.equal(value, want[name]), name
        else:
            assert value.isfinite().all()
    engine.detach()


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_is_resumed(pool2, pool3, mode, tmp_path):
    folder = str(tmp_path / "checkpoint")
    want = pool2.run(written, mode, folder)[0]
    pool2.run(read, mode, folder, want, 0)
    pool2.run(read, mode, folder, want, 2)
    pool3.run(read, mode, folder, want, 0)


def interrupted(rank, world, folder):
    """A second checkpoint that is cut off leaves the first one whole."""
    model, opt, engine = start(rank, "sharded")
    dcp.save({"training": TrainingState(model, opt, engine)}, checkpoint_id=f"{folder}/3")
    want = final(model)
    training.plain_step(model, opt, rank, 3)
    dcp.save({"training": TrainingState(model, opt, engine)}, checkpoint_id=f"{folder}/4")
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(f"{folder}/4")
    engine.detach()
    model, opt, engine = start(rank, "sharded", steps=0)
    dcp.load({"training": TrainingState(model, opt, engine)}, checkpoint_id=f"{folder}/3")
    same(final(model), want)
    engine.detach()
    assert isinstance(model, DDP)


def test_each_checkpoint_stands_alone(pool2, tmp_path):
    pool2.run(interrupted, str(tmp_path))
