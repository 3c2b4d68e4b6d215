"""What is given in the place of something else, or too late: one sentence that says what to do."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import training
from refusing import SMALL, final, refused, same, trains_on_like_plain

import compress
import dear
import precondition


def kinds(rank, world):
    model, opt = training.build("Mlp", training.SGD, {})
    compiled = torch.compile(model, backend="eager")
    for caller, call in (
        ("dear.attach()", lambda: dear.attach(compiled, opt)),
        ("compress.register()", lambda: compress.register(compiled, compress.TopK())),
    ):
        with refused(TypeError, re.escape(caller) + r" needs .* torch\.compile has wrapped here.*model\._orig_mod"):
            call()
    for given, named in (("safe", "safe"), ("fast", "fast"), ("exact", "exact"), ("powersgd", "safe")):
        with refused(TypeError, rf'not the string \'{given}\': make one, such as compress\.preset\("{named}"\)'):
            dear.attach(model, opt, compressor=given)
    with refused(TypeError, r"compress\.register\(\) needs a compressor, not the string"):
        compress.register(model, "safe")
    for given in (precondition.DPKFAC(), precondition.DPKFAC):
        with refused(TypeError, r"DPKFAC is a preconditioner: pass it to dear\.attach\(\) as preconditioner="):
            dear.attach(model, opt, compressor=given)
    with refused(TypeError, r"AdamW is a class: .*such as AdamW\(model\.parameters\(\), lr=0\.1\)"):
        dear.attach(model, torch.optim.AdamW)
    with refused(TypeError, "SGD is a class"):
        precondition.register(model, torch.optim.SGD, precondition.Eva())
    engine = dear.attach(compiled._orig_mod, opt, **SMALL)
    trains_on_like_plain(rank, model, opt, 0)
    engine.detach()


def test_something_else_in_the_place_of_an_argument(pool2):
    pool2.run(kinds)


def logged_late(rank, world):
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, **SMALL)
    engine.log_every(10)
    engine.detach()
    with refused(RuntimeError, "engine.log_every.* this one is detached"):
        engine.log_every(10)


def test_lines_in_the_log_of_an_engine_that_is_detached(pool2):
    pool2.run(logged_late)


@pytest.mark.parametrize("given", [{"head*": 0}, {"a": 4, "head*": "big"}], ids=str)
def test_a_rank_that_cannot_be_is_named_with_its_pattern(given):
    with refused(ValueError, r"^For 'head\*', rank_of must be a whole number from 1 to 256"):
        compress.PowerSGD(rank_of=given)


def called(rank, world):
    model, opt = training.build("Mlp", training.SGD, {})
    name = next(iter(dict(model.module.named_parameters())))
    with refused(ValueError, f"For '{re.escape(name)}', rank_of must be"):
        dear.attach(model, opt, compressor=compress.PowerSGD(rank_of=lambda name, param: 0))


def test_a_callables_rank_is_named_with_the_parameter(pool2):
    pool2.run(called)


@pytest.mark.parametrize("option", ["exempt", "rank_of"])
@pytest.mark.parametrize("function", [lambda name: True, lambda: True, lambda name, param, more: True])
def test_a_callable_of_other_arguments_is_refused(option, function):
    with pytest.raises(TypeError, match=f"^{option} is called with the name of a parameter and the parameter"):
        compress.PowerSGD(**{option: function})


def test_callables_that_take_two_arguments_are_taken():
    for function in (lambda name, param: True, lambda *both: True, lambda name, param, more=1: True, max):
        compress.PowerSGD(exempt=function)


def states(rank, world):
    model, opt = training.build("Mlp", training.SGD, {})
    compressor = compress.TopK(density=0.1, min_compression_ratio=0.1)
    engine = dear.attach(model, opt, compressor=compressor)
    for step in range(2):
        training.plain_step(model, opt, rank, step)
    state = engine.state_dict()
    with refused(ValueError, r'This is an engine\'s state.* pass state\["compressor"\]'):
        compressor.load_state_dict(state)
    compressor.load_state_dict(state["compressor"])
    for wrong in (None, [state]):
        with refused(TypeError, f"An engine's state is a dict, not {type(wrong).__name__}"):
            engine.load_state_dict(wrong)
    engine.detach()
    other = dear.attach(model, opt, compressor=compress.SignSGD())
    with refused(ValueError, 'state of TopK, not of SignSGD: .*leave "compressor" out of an engine\'s state to start'):
        other.load_state_dict(state)
    other.detach()
    return state


def test_states_of_something_else(pool2):
    pool2.run(states)


def dropped(rank, world, kept):
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, compressor=compress.TopK(0.1, min_compression_ratio=0.1, error_feedback=kept))
    for step in range(2):
        training.plain_step(model, opt, rank, step)
    state = engine.state_dict()
    engine.detach()
    engine = dear.attach(model, opt)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.load_state_dict(state)
        engine.load_state_dict({key: value for key, value in state.items() if key != "compressor"})
    engine.detach()
    said = [each for each in caught if "what was not sent yet is dropped" in str(each.message)]
    assert len(said) == kept, [str(each.message) for each in caught]
    assert all(each.filename == __file__ for each in said)


@pytest.mark.parametrize("kept", [True, False], ids=["error feedback", "none"])
def test_error_feedback_that_an_engine_without_compressor_drops(pool2, kept):
    pool2.run(dropped, kept)


def zeroed(rank, world, update):
    model, opt = training.build("Mlp", training.SGD, {})
    engine = dear.attach(model, opt, update=update, **SMALL)
    training.plain_step(model, opt, rank, 0)
    training.loss_of(model, rank, 1).backward()
    next(model.parameters()).grad.zero_()
    if update == "replicated":
        opt.step()
        opt.zero_grad()
        plain, plain_opt = training.build("Mlp", training.SGD, {})
        training.plain_step(plain, plain_opt, rank, 0)
        training.loss_of(plain, rank, 1).backward()
        next(plain.parameters()).grad.zero_()
        plain_opt.step()
        engine.detach()
        same(final(model), final(plain))
        return
    with refused(RuntimeError, r'as \.grad\.zero_\(\) does: .*need update="replicated"'):
        opt.step()
    engine.detach()


@pytest.mark.parametrize("update", ["sharded", "owned", "replicated"])
def test_a_gradient_that_is_zeroed_between_backward_and_step(pool2, update):
    pool2.run(zeroed, update)
