"""``compressor="auto"``, saved where it has settled on a compressor: what is resumed trains the same, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import training
from auto_instruments import SLOW, Prescribed
from test_auto import ADAMW

import dear
from compress import losses
from planner import auto
from planner.auto import Auto

SETTLED = auto.MOST + 4  # steps


def seconds(setting):
    """Of a step: compression is faster."""
    return 2.0 if setting.compressor is None else 1.0


def attached(plan=None):
    instruments = Prescribed(SLOW, seconds)
    model, opt = training.build("Mlp", ADAMW, {})
    return model, opt, dear.attach(model, opt, compressor=Auto("4%", plan, instruments=instruments)), instruments


def resumed(rank, world, method):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "within", lambda bound: [method])
        model, opt, engine, instruments = attached()
        for step in range(SETTLED):
            training.plain_step(model, opt, rank, step)
            instruments.step_ends(engine)
        assert engine.compressor is not None
        saved = copy.deepcopy((model.state_dict(), opt.state_dict(), engine.state_dict()))
        plan = engine.plan

        def rest(model, opt, engine):
            for step in range(SETTLED, SETTLED + 4):
                training.plain_step(model, opt, rank, step)
            engine.synchronize()
            values = copy.deepcopy(model.state_dict())
            engine.detach()
            return values

        expected = rest(model, opt, engine)
        for given, steps in ((None, 0), (plan, 0), (None, 3)):  # 3: the search has begun again
            model, opt, engine, _ = attached(given)
            for step in range(steps):
                training.plain_step(model, opt, rank, step)
            parameters, state, own = copy.deepcopy(saved)
            model.load_state_dict(parameters)
            opt.load_state_dict(state)
            engine.load_state_dict(own)
            values = rest(model, opt, engine)
            assert all(torch.equal(values[name], expected[name]) for name in expected), (given is not None, steps)


@pytest.mark.parametrize("method", ["safe", "acp:4", "topk:0.01"])
def test_what_was_settled_is_resumed_to_the_bit(pool2, method):
    pool2.run(resumed, method)
