"""What a tuner or auto has found is part of the engine's state: a run that is resumed does not search again."""

from __future__ import annotations

import io

import pytest
import torch
import training
from auto_instruments import SLOW, Prescribed
from refusing import final, same
from test_auto import ADAMW, PLAN, Heard
from test_tuner import SIZES, Clock
from torch import optim

import dear
from dear.integrations import dcp_sharded
from dear.integrations.dcp import TrainingState
from planner.auto import Auto

SGD = (optim.SGD, {"lr": 0.1, "momentum": 0.9})
POWER = PLAN | {"update": "replicated", "compressor": "power:4", "bucket_cap_mb": 0.004}


def through_file(state):
    """As the integrations load it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# the tuner


def attach_for_tuning():
    model, opt = training.build("Mlp", SGD, {})
    return model, opt, dear.attach(model, opt, bucket_cap_mb=0.002)


def tune(engine, sizes=SIZES):
    clock = Clock(engine, {0.001: [3.0], 0.002: [2.0], 0.004: [1.0]})
    return dear.FusionTuner(engine, sizes, steps=1, rounds=1, clock=clock), clock


def train(rank, model, opt, steps, tuner=None, clock=None):
    for step in steps:
        training.plain_step(model, opt, rank, step)
        if tuner is not None:
            clock.step()
            tuner.step()


def tuned_state(rank, world):
    """In mid-search, and after it."""
    model, opt, engine = attach_for_tuning()
    tuner, clock = tune(engine)
    train(rank, model, opt, range(4), tuner, clock)
    early = through_file({**engine.state_dict()})
    train(rank, model, opt, range(4, 8), tuner, clock)
    assert tuner.best == 0.004
    state = through_file(engine.state_dict())
    assert "tuner" not in early and state["tuner"]["best"] == 0.004
    engine.detach()
    return early, state


def has_it(engine, tuner):
    return not tuner.tuning and engine.bucket_cap_mb == pytest.approx(0.004, rel=0.01)


def tuned_again(rank, world):
    early, state = tuned_state(rank, world)
    model, opt, engine = attach_for_tuning()
    tuner, _ = tune(engine)
    engine.load_state_dict(early)
    assert tuner.tuning and engine.bucket_cap_mb == pytest.approx(0.001, rel=0.01), "in mid-search it begins again"
    engine.load_state_dict(state)
    assert has_it(engine, tuner) and tuner.times == {0.001: 3.0, 0.002: 2.0, 0.004: 1.0}
    assert engine.state_dict()["tuner"] == state["tuner"]
    engine.load_state_dict({"optimizer": state["optimizer"]})  # as before there were tuners in it
    assert has_it(engine, tuner)
    engine.detach()

    model, opt, engine = attach_for_tuning()
    engine.load_state_dict(state)
    assert engine.state_dict()["tuner"] == state["tuner"], "nobody has taken it yet"
    tuner, clock = tune(engine)
    assert has_it(engine, tuner), "also where the tuner is made after loading"
    train(rank, model, opt, range(3), tuner, clock)
    assert has_it(engine, tuner)
    assert dear.FusionTuner(engine, SIZES).tuning, "a second tuner is there to search again"
    engine.detach()

    model, opt, engine = attach_for_tuning()
    engine.load_state_dict(state)
    assert tune(engine, [0.001, 0.004])[0].tuning, "among other sizes another one may be the fastest"
    engine.detach()

    model, opt, engine = attach_for_tuning()
    tuner, clock = tune(engine)
    train(rank, model, opt, range(2))
    training.loss_of(model, rank, 2).backward()
    engine.load_state_dict(state)  # a step is due first
    opt.step()
    assert not tuner.tuning and not has_it(engine, tuner)
    tuner.step()
    assert has_it(engine, tuner)
    engine.detach()


def test_a_tuner_goes_on_with_what_it_had_found(pool2):
    pool2.run(tuned_again)


def searches_again(rank, world, state):
    _, _, engine = attach_for_tuning()
    tuner, _ = tune(engine)
    engine.load_state_dict(state)
    assert tuner.tuning, "two workers' times say nothing of three"
    engine.detach()


def test_a_tuner_searches_again_among_other_workers(pool2, pool3):
    (_, state), _ = pool2.run(tuned_state)
    pool3.run(searches_again, state)


def beside_auto(rank, world):
    model, opt = training.build("Mlp", SGD, {})
    engine = dear.attach(model, opt, compressor=Auto())
    with pytest.raises(RuntimeError, match=r"tunes the size.*itself: leave the tuner out"):
        dear.FusionTuner(engine)
    engine.detach()


def test_a_tuner_beside_auto_is_refused(pool2):
    pool2.run(beside_auto)


# auto


def start(plan=None, **attach):
    model, opt = training.build("Mlp", ADAMW, {})
    auto = Auto(0.08, plan, instruments=Prescribed(SLOW, lambda setting: 1.0))
    return model, opt, dear.attach(model, opt, compressor=auto, **attach)


def load_from(how, model, opt, engine, saved):
    """By one of the roads by which states are loaded."""
    if how == "engine":
        model.module.load_state_dict(saved["model"])
        engine.load_state_dict(saved["engine"])
    elif how == "dcp":
        TrainingState(model, opt, engine).load_state_dict(saved["dcp"])
    else:
        dcp_sharded.load(saved["folder"], model, [opt], engine)


def follows(rank, world, plan, how, before, folder):
    """A run with a plan, and one that searches, or has begun to, and takes the other's state."""
    model, opt, engine = start(plan)
    train(rank, model, opt, range(4))
    dcp_sharded.save(f"{folder}/4", model, [opt], engine)
    saved = {
        "model": {name: value.clone() for name, value in model.module.state_dict().items()},
        "engine": through_file(engine.state_dict()),
        "dcp": through_file(TrainingState(model, opt, engine).state_dict()),
        "folder": f"{folder}/4",
    }
    assert saved["engine"]["auto"] == {"plan": plan}
    train(rank, model, opt, range(4, 8))
    want = final(model)
    engine.detach()

    model, opt, engine = start()
    train(rank, model, opt, range(before))
    torch.nn.init.zeros_(next(model.parameters()))
    load_from(how, model, opt, engine, saved)
    assert (engine.update, engine.plan) == (plan["update"], plan), "from the first step on"
    assert (engine.compressor is None) == (plan["compressor"] is None)
    train(rank, model, opt, range(4, 8))
    same(final(model), want)
    train(rank, model, opt, range(8, 30))
    assert engine.plan == plan and engine.update == plan["update"], "it searches no more"
    if before:
        assert not engine.stop_trace(), "nothing is traced any more"
    engine.detach()


@pytest.mark.parametrize(
    ("plan", "how", "before"),
    [
        (PLAN, "engine", 0),
        (PLAN | {"update": "sharded"}, "engine", 4),  # its steps are being profiled, by the scheduler that goes on
        (POWER, "engine", 4),
        (POWER, "dcp", 0),
        (PLAN | {"update": "replicated"}, "dcp_sharded", 0),
        (POWER, "dcp_sharded", 12),  # ways are being tried
    ],
    ids=["ddp", "sharded", "power", "power by dcp", "replicated by dcp_sharded", "power by dcp_sharded"],
)
def test_auto_goes_on_with_its_plan(pool2, plan, how, before, tmp_path):
    pool2.run(follows, plan, how, before, str(tmp_path))


def in_mid_search(rank, world):
    """What is in force is a trial: neither it nor what its compressor has not sent is saved."""
    model, opt, engine = start()
    states = []
    for step in range(40):
        training.plain_step(model, opt, rank, step)
        if engine.compressor is not None:
            states.append(engine.state_dict())
    assert states and all("auto" not in state and "compressor" not in state for state in states)
    engine.load_state_dict(through_file(states[0]))  # into the same run
    assert engine.plan is None
    engine.detach()
    model, opt, engine = start()
    engine.load_state_dict(through_file(states[0]))
    train(rank, model, opt, range(3))
    assert engine.plan is None and engine.compressor is None
    engine.detach()


def test_auto_in_mid_search_begins_again(pool2):
    pool2.run(in_mid_search)


def between(rank, world):
    """Loading a plan where gradients wait for their step, as after a loss that made no sense."""
    results = []
    for plan in (None, PLAN | {"update": "replicated"}):
        model, opt = training.build("Mlp", ADAMW, {})
        engine = None
        if plan is not None:
            engine = dear.attach(model, opt, compressor=Auto(instruments=Prescribed(SLOW, lambda setting: 1.0)))
        train(rank, model, opt, range(3))
        training.loss_of(model, rank, 3).backward()
        if engine is not None:
            engine.load_state_dict({"bucket_order": [], "auto": {"plan": plan}})
            assert engine.update == "replicated"
        opt.step()
        opt.zero_grad()
        train(rank, model, opt, range(4, 6))
        if engine is not None:
            engine.detach()
        results.append(final(model))
    same(results[1], results[0])


def test_a_plan_may_come_between_backward_and_step(pool2):
    pool2.run(between)


def others(rank, world, state):
    """A plan of two workers, loaded by three: one warning, and all the rest is taken."""
    with Heard() as said:
        model, opt, engine = start()
        engine.load_state_dict(state)
        train(rank, model, opt, range(2))
    assert engine.plan is None and engine.compressor is None
    assert [("2 workers" in sentence, "left aside" in sentence) for sentence in said] == ([(True, True)] * (rank == 0))
    assert engine.state_dict()["optimizer"]["state"][0]["step"] == 6
    engine.detach()


def planned_state(rank, world):
    model, opt, engine = start(POWER)
    train(rank, model, opt, range(4))
    state = through_file(engine.state_dict())
    engine.detach()
    return state


def test_auto_chooses_again_among_other_workers(pool2, pool3):
    pool3.run(others, pool2.run(planned_state)[0])


def second_time(rank, world):
    """An auto that was given back serves the next engine, with its plan; not two at once."""
    model, opt = training.build("Mlp", ADAMW, {})
    auto = Auto(plan=PLAN)
    engine = dear.attach(model, opt, compressor=auto)
    other, other_opt = training.build("Mlp", ADAMW, {})
    with pytest.raises(ValueError, match="serves an engine already"):
        dear.attach(other, other_opt, compressor=auto)
    engine.detach()
    engine = dear.attach(model, opt, compressor=auto)
    assert engine.plan == PLAN and engine.update == "ddp"
    engine.detach()
    smaller = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    engine = dear.attach(smaller, optim.AdamW(smaller.parameters()), compressor=auto)
    assert engine.plan is None, "a plan of another model"
    engine.detach()


def test_an_auto_may_serve_again(pool2):
    pool2.run(second_time)
