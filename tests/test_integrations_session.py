"""What all integrations share: their file in a checkpoint, and what a second training begins with."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
import training
from auto_instruments import SLOW, Prescribed
from refusing import final, refused, same
from test_auto import ADAMW, PLAN
from test_tuner import SIZES, Clock
from torch.distributed.checkpoint.state_dict import get_state_dict

import compress
import dear
from dear.integrations import accelerate, dcp_sharded
from dear.integrations._session import FILE, Session, read_file, write_file
from planner.auto import Auto

POWER = PLAN | {"update": "replicated", "compressor": "power:4", "bucket_cap_mb": 0.004}


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    folder, save = str(tmp_path), torch.save
    assert read_file(folder) is None
    write_file(folder, {"bucket_order": ["a"]})

    def die(state, path):
        save(state, path)
        with open(path, "r+b") as file:
            file.truncate(100)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        write_file(folder, {"bucket_order": ["b"]})
    assert read_file(folder) == {"bucket_order": ["a"]}
    monkeypatch.undo()
    write_file(folder, {"bucket_order": ["c"]})
    assert read_file(folder) == {"bucket_order": ["c"]}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def steps(rank, model, opt, which):
    for step in which:
        training.plain_step(model, opt, rank, step)


def trained_twice(rank, world, given):
    """A second training under "auto", whose error feedback is not lost between, equals one that is not interrupted."""
    results = []
    for interrupted in (False, True):
        instruments = Prescribed(SLOW, lambda setting: 1.0)
        session = Session({"compressor": Auto(0.08, POWER if given else None, instruments=instruments)})
        model, opt = training.build("Mlp", ADAMW, {})
        if not given:
            session.load({"bucket_order": [], "auto": {"plan": POWER}}, "The checkpoint")
        engine = session.begin(model, [opt])
        steps(rank, model, opt, range(3))
        if interrupted:
            engine.synchronize()
            session.end()
            engine = session.begin(model, [opt])
        assert engine.plan == POWER and engine.compressor is not None
        steps(rank, model, opt, range(3, 6))
        results.append(final(model))
        session.end()
        assert session.state()["auto"] == {"plan": POWER}
    same(results[1], results[0])


@pytest.mark.parametrize("given", [True, False], ids=["given", "loaded"])
def test_a_second_training_goes_on_with_the_plan(pool2, given):
    pool2.run(trained_twice, given)


def tuned_twice(rank, world):
    session = Session({"bucket_cap_mb": 0.002})
    model, opt = training.build("Mlp", ADAMW, {})
    for time in range(2):
        engine = session.begin(model, [opt])
        clock = Clock(engine, {0.001: [3.0], 0.002: [2.0], 0.004: [1.0]})
        tuner = dear.FusionTuner(engine, SIZES, steps=1, rounds=1, clock=clock)
        assert tuner.tuning == (time == 0)
        for step in range(7):
            training.plain_step(model, opt, rank, step)
            clock.step()
            tuner.step()
        assert tuner.best == 0.004
        session.end()


def test_a_second_training_goes_on_with_the_size(pool2):
    pool2.run(tuned_twice)


def without_state(rank, world):
    """A checkpoint of plain DDP: "auto" has no compressor yet that could miss its error feedback."""
    session = Session({"compressor": "auto"})
    session.load(None, "The checkpoint")
    model, opt = training.build("Mlp", ADAMW, {})
    session.begin(model, [opt])
    steps(rank, model, opt, range(2))
    session.end()


def test_auto_begins_from_a_checkpoint_of_plain_ddp(pool2):
    pool2.run(without_state)


def ends_badly(rank, world, late):
    """A peer is missing when training ends, before anything was given back or after it: the framework hears of that,
    and may take the optimizer apart."""
    session = Session({"update": "sharded", "bucket_cap_mb": 0.002})
    model, opt = training.build("Mlp", ADAMW, {})
    engine = session.begin(model, [opt])
    steps(rank, model, opt, range(2))

    def fail():
        if late:
            type(engine).detach(engine)
        raise ConnectionError("rank 1 is missing")

    engine.detach = fail
    with pytest.raises(ConnectionError) as caught:
        session.end()
    session.give_up(caught.value)
    assert not list(opt.state.values()), "it can be read, and has nothing: the other ranks' parts are gone"
    with pytest.raises(RuntimeError, match="no engine now"):
        _ = session.engine
    session.give_up(caught.value)


@pytest.mark.parametrize("late", [False, True])
def test_an_end_that_fails_is_not_hidden_by_another_error(pool2, late):
    pool2.run(ends_badly, late)


def test_accelerate_before_prepare():
    """Or with what is inside, or in a process alone, for which Accelerate wraps nothing."""
    model = torch.nn.Linear(4, 4)
    with refused(TypeError, r"that accelerator\.prepare\(\) returns .*, not Linear: call it after prepare\(\)"):
        accelerate.attach(None, model, torch.optim.SGD(model.parameters(), lr=0.1))


def loaded_too_early(rank, world):
    """accelerator.load_state() before attach() loads the optimizer's state alone."""

    class Accelerator:
        def register_save_state_pre_hook(self, hook): ...

        def register_load_state_pre_hook(self, hook): ...

    for early in (False, True):
        model, opt = training.build("Mlp", ADAMW, {})
        if early:
            training.plain_step(model, opt, rank, 0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine = accelerate.attach(Accelerator(), model, opt, compressor=compress.PowerSGD(rank=2))
        assert ["call it after attach()" in str(each.message) for each in caught] == [True] * early
        engine.detach()


def test_a_state_that_was_loaded_too_early_is_told(pool2):
    pool2.run(loaded_too_early)


def without_feedback(rank, world):
    """A plain optimizer's state, loaded into an engine with a compressor that keeps what it has not sent."""
    model, opt = training.build("Mlp", ADAMW, {})
    training.plain_step(model, opt, rank, 0)
    plain = copy.deepcopy(opt.state_dict())
    for feedback in (True, False):
        model, opt = training.build("Mlp", ADAMW, {})
        engine = dear.attach(model, opt, compressor=compress.PowerSGD(rank=2, error_feedback=feedback))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.load_state_dict({"optimizer": plain})
            engine.load_state_dict(engine.state_dict())
            engine.load_state_dict(engine.state_dict(optimizer=False))
        assert ["has no error feedback" in str(each.message) for each in caught] == [True] * feedback
        engine.detach()


def test_a_state_without_error_feedback_is_told(pool2):
    pool2.run(without_feedback)


def plain_parts(rank, world, folder):
    """A checkpoint that DCP wrote for plain DDP."""
    model, opt = training.build("Mlp", ADAMW, {})
    training.plain_step(model, opt, rank, 0)
    weights, state = get_state_dict(model, opt)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/plain")
    engine = dear.attach(model, opt, compressor=compress.PowerSGD(rank=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp_sharded.load(f"{folder}/plain", model, opt, engine)
        dcp_sharded.save(f"{folder}/ours", model, opt, engine)
        dcp_sharded.load(f"{folder}/ours", model, opt, engine)
    told = [str(each.message) for each in caught if "feedback" in str(each.message)]
    assert len(told) == 1 and "plain has no error feedback" in told[0]
    engine.detach()


def test_parts_without_error_feedback_are_told(pool2, tmp_path):
    pool2.run(plain_parts, str(tmp_path))
