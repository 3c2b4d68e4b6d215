"""Checkpoints of which no rank holds all: read back bit for bit, by other numbers of ranks, and by plain DDP."""

from __future__ import annotations

import itertools
import os
import signal
import warnings

import owning
import pytest
import torch
import torch.distributed.checkpoint as dcp
import training
from compressing import KINDS
from refusing import SMALL, refused, same
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from workers import WorkerDied, run_workers

import dear
from dear import _state
from dear.integrations import dcp_sharded
from dear.integrations._pieces import boxes

ADAM = (torch.optim.AdamW, {"lr": 0.01})
OPTIMIZERS = {
    "sharded": ADAM,
    "replicated": ADAM,
    "adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
    "factored": (owning.Factored, {"lr": 0.01}),
    "several": (owning.muon_and_adamw, {}),
    "stateless": (torch.optim.SGD, {"lr": 0.01}),
}
STRATEGY = {"adafactor": "owned", "factored": "owned", "several": "owned", "stateless": "replicated"}


def start(rank, mode, steps, model="Mlp"):
    """A model, its optimizers as a list, one object that steps all of them, and the engine."""
    wrapped, opt = training.build(model, OPTIMIZERS.get(mode, ADAM), {})
    optimizers = getattr(opt, "optimizers", [opt])
    compressor = KINDS[mode](min_compression_ratio=0.2) if mode in KINDS else None
    update = "replicated" if compressor else STRATEGY.get(mode, mode)
    engine = dear.attach(wrapped, optimizers, update=update, compressor=compressor, **SMALL)
    for step in range(steps):
        training.plain_step(wrapped, opt, rank, step)
    return wrapped, optimizers, opt, engine


@pytest.mark.parametrize(("option", "moves"), [("foreach", False), ("fused", True), ("capturable", True)])
def test_what_was_read_on_the_host_goes_where_torch_puts_it(option, moves):
    """Of a parameter that is elsewhere: a fused update on a GPU reads the number of steps there."""
    param, group = nn.Parameter(torch.empty(3, device="meta")), {option: True}
    found = _state.placed(param, {"step": torch.ones(()), "eta": torch.ones(()), "name": "x"}, group)
    assert found["eta"].is_meta and found["name"] == "x" and found["step"].is_meta == moves
    optimizer = torch.optim.SGD([param], lr=0.1)  # which loads whatever state it is given
    optimizer.param_groups[0].update(group)
    state = {"state": {0: {"step": torch.ones(()), "eta": torch.ones(())}}}
    optimizer.load_state_dict(optimizer.state_dict() | state)
    assert all(optimizer.state[param][key].device == found[key].device for key in ("step", "eta"))


@pytest.mark.parametrize("size", [(), (7,), (3, 4), (2, 3, 4), (5, 1, 2)], ids=str)
def test_boxes_cover_a_run_once(size):
    """Every run of every tensor, laid out in every order of its dimensions."""
    for order in itertools.permutations(range(len(size))):
        flat = torch.arange(max(1, torch.Size(size).numel()))
        stride, step = [0] * len(size), 1
        for dim in reversed(order):
            stride[dim], step = step, step * size[dim]
        whole = flat.as_strided(size, stride)
        for begin, end in itertools.combinations(range(flat.numel() + 1), 2):
            found = torch.zeros(size, dtype=torch.int)
            for offsets, sizes, at in boxes(size, stride, begin, end):
                place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
                assert torch.equal(flat.as_strided(sizes, stride, at), whole[place])
                found[place] += 1
            assert torch.equal(found, ((whole >= begin) & (whole < end)).int()), (order, begin, end)


def final(model):
    """Parameters only: each rank has batch statistics of its own."""
    return {name: param.detach().clone() for name, param in model.module.named_parameters()}


MODES = ["sharded", "replicated", "adafactor", "factored", "several", "stateless", "power", "topk"]


def written(rank, world, mode, folder, model):
    """The steps that follow a checkpoint, in the run that wrote it; no rank has gathered the state."""
    wrapped, optimizers, opt, engine = start(rank, mode, 3, model)
    gather, _state.gather = _state.gather, None
    try:
        dcp_sharded.save(f"{folder}/3", wrapped, optimizers, engine)
    finally:
        _state.gather = gather
    for step in range(3, 7):
        training.plain_step(wrapped, opt, rank, step)
    result = final(wrapped)
    engine.detach()
    return result


def read(rank, world, mode, folder, model, before, want):
    """Into a run that has made ``before`` steps."""
    wrapped, optimizers, opt, engine = start(rank, mode, before, model)
    nn.init.zeros_(next(wrapped.parameters()))
    gather, _state.gather = _state.gather, None
    try:
        dcp_sharded.load(f"{folder}/3", wrapped, optimizers, engine)
    finally:
        _state.gather = gather
    for step in range(3, 7):
        training.plain_step(wrapped, opt, rank, step)
    if world == 2:
        same(final(wrapped), want)
    else:
        assert all(value.isfinite().all() for value in final(wrapped).values())
    engine.detach()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.slow
def test_a_checkpoint_is_resumed(pool2, pool3, mode, tmp_path):
    want = pool2.run(written, mode, str(tmp_path), "Mlp")[0]
    pool2.run(read, mode, str(tmp_path), "Mlp", 0, want)
    pool2.run(read, mode, str(tmp_path), "Mlp", 2, want)
    pool3.run(read, mode, str(tmp_path), "Mlp", 0, None)


@pytest.mark.slow
def test_a_channels_last_model(pool2, tmp_path):
    want = pool2.run(written, "sharded", str(tmp_path), "Convolution")[0]
    pool2.run(read, "sharded", str(tmp_path), "Convolution", 0, want)


def to_and_from_plain(rank, world, mode, folder):
    """Ordinary DCP reads it by name into plain DDP, and what that saves is read here."""
    wrapped, optimizers, opt, engine = start(rank, mode, 3)
    dcp_sharded.save(f"{folder}/ours", wrapped, optimizers, engine)
    plain, plain_opt = training.build("Mlp", OPTIMIZERS[mode], {})
    plain_list = getattr(plain_opt, "optimizers", [plain_opt])
    weights, state = get_state_dict(plain, plain_list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/ours")
    set_state_dict(plain, plain_list, model_state_dict=weights, optim_state_dict=state)
    for step in range(3, 6):
        training.plain_step(wrapped, opt, rank, step)
        training.plain_step(plain, plain_opt, rank, step)
    same(final(plain), final(wrapped))
    engine.detach()

    weights, state = get_state_dict(plain, plain_list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/plain")
    for before in (0, 2):
        wrapped, optimizers, opt, engine = start(rank, mode, before)
        dcp_sharded.load(f"{folder}/plain", wrapped, optimizers, engine)
        for step in range(6, 9):
            training.plain_step(wrapped, opt, rank, step)
            if before == 0:
                training.plain_step(plain, plain_opt, rank, step)
        same(final(wrapped), final(plain))
        engine.detach()


@pytest.mark.parametrize("mode", ["sharded", "adafactor", "several", "stateless"])
@pytest.mark.slow
def test_plain_ddp_reads_it_and_is_read(pool2, mode, tmp_path):
    pool2.run(to_and_from_plain, mode, str(tmp_path))


def in_parts(rank, world, folder):
    """How much of the state each rank has at any time: its part, and what of the parameters at its ends."""
    wrapped, optimizers, opt, engine = start(rank, "sharded", 3)
    dcp_sharded.save(f"{folder}/3", wrapped, optimizers, engine)
    numel = sum(param.numel() for param in wrapped.parameters())
    engine.detach()
    wrapped, optimizers, opt, engine = start(rank, "sharded", 0)
    dcp_sharded.load(f"{folder}/3", wrapped, optimizers, engine)
    assert not any(optimizer.state for optimizer in optimizers)
    runs = engine._update.state_parts().runs
    held = sum(values.numel() for keys in runs.values() for runs in keys.values() for _, values in runs)
    assert held == pytest.approx(2 * numel / world, rel=0.05)
    training.plain_step(wrapped, opt, rank, 3)
    assert engine.stats()["optimizer_state_bytes"] == pytest.approx(8 * numel / world, rel=0.1)
    engine.detach()


def test_each_rank_has_its_part(pool2, tmp_path):
    pool2.run(in_parts, str(tmp_path))


def before_training(rank, world, folder):
    """What was loaded before the first backward pass is the optimizer's full state for whoever asks, and another state
    that is loaded after it counts in its place."""
    wrapped, optimizers, opt, engine = start(rank, "sharded", 3)
    dcp_sharded.save(f"{folder}/3", wrapped, optimizers, engine)
    want = engine.state_dict()["optimizer"]["state"]
    engine.detach()
    for how in ("state_dict", "full_state", "detach", "saved", "replaced"):
        wrapped, optimizers, opt, engine = start(rank, "sharded", 0)
        dcp_sharded.load(f"{folder}/3", wrapped, optimizers, engine)
        if how == "replaced":
            zeros = {i: {k: torch.zeros_like(v) for k, v in each.items()} for i, each in want.items()}
            with_groups = {
                "state": zeros,
                "param_groups": torch.optim.AdamW(wrapped.parameters()).state_dict()["param_groups"],
            }
            engine.load_state_dict({"optimizer": with_groups})
            have = engine.state_dict()["optimizer"]["state"]
            assert not any(value.any() for each in have.values() for value in each.values())
            engine.detach()
            continue
        if how == "saved":
            dcp_sharded.save(f"{folder}/again", wrapped, optimizers, engine)
            engine.detach()
            wrapped, optimizers, opt, engine = start(rank, "sharded", 0)
            dcp_sharded.load(f"{folder}/again", wrapped, optimizers, engine)
        if how == "full_state":
            with engine.full_state():
                have = opt.state_dict()["state"]
        elif how == "detach":
            engine.detach()
            have = opt.state_dict()["state"]
        else:
            have = engine.state_dict()["optimizer"]["state"]
        for index, state in want.items():
            assert have[index].keys() == state.keys()
            assert all(torch.equal(have[index][key], value) for key, value in state.items()), how
        engine.detach()


@pytest.mark.slow
def test_what_was_loaded_before_training_is_there(pool2, tmp_path):
    pool2.run(before_training, str(tmp_path))


# an interrupted write


def killed_while_writing(rank, world, folder):
    """The second checkpoint: one rank dies when some of its files are written, and others are not."""
    wrapped, optimizers, opt, engine = start(rank, "sharded", 3)
    dcp_sharded.save(f"{folder}/3", wrapped, optimizers, engine)
    want = final(wrapped)
    training.plain_step(wrapped, opt, rank, 3)
    if rank == 1:
        fsync = os.fsync

        def die(descriptor):
            fsync(descriptor)
            os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = die
    try:
        dcp_sharded.save(f"{folder}/4", wrapped, optimizers, engine)
    except (RuntimeError, ValueError, torch.distributed.checkpoint.CheckpointException):
        return want
    raise AssertionError("a checkpoint of which a writer died was called whole")


def goes_on(rank, world, folder, want):
    """The last good one is as it was; the other is not there, and can be written again."""
    assert not os.path.exists(f"{folder}/4") and os.path.exists(f"{folder}/4.partial")
    wrapped, optimizers, opt, engine = start(rank, "sharded", 0)
    with refused(ValueError, "holds no whole checkpoint"):
        dcp_sharded.load(f"{folder}/4", wrapped, optimizers, engine)
    nn.init.zeros_(next(wrapped.parameters()))
    dcp_sharded.load(f"{folder}/3", wrapped, optimizers, engine)
    same(final(wrapped), want)
    training.plain_step(wrapped, opt, rank, 3)
    dcp_sharded.save(f"{folder}/4", wrapped, optimizers, engine)
    assert sorted(os.listdir(folder)) == ["3", "4"]
    with refused(ValueError, "is there already"):
        dcp_sharded.save(f"{folder}/4", wrapped, optimizers, engine)
    engine.detach()


@pytest.mark.slow
def test_a_killed_writer_harms_nothing(pool2, tmp_path):
    outcomes = run_workers(killed_while_writing, 2, str(tmp_path), group_timeout=20.0, expect_dead=[1])
    assert isinstance(outcomes[1], WorkerDied)
    pool2.run(goes_on, str(tmp_path), outcomes[0])
