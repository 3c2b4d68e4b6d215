"""Presets that send more in their first steps: a trial is of what they send later, and training has the start once."""

from __future__ import annotations

import pytest
import training
from auto_instruments import SLOW, Prescribed
from test_auto import ADAMW, Heard

import dear
from compress import losses, presets
from planner import auto, codecs
from planner.auto import Auto

START = 40  # steps, in place of a thousand


class Seconds:
    """Of a step: compression is faster, and slower in a preset's start. From step ``turns`` on all is three times as
    fast."""

    def __init__(self, turns):
        self.step, self.turns, self.engine = 0, turns, None

    def __call__(self, setting):
        self.step += 1
        one = setting.compressor
        seconds = 2.0 if one is None else 1.5 if one.step < one.start.given else 1.0
        return seconds / (3 if self.step > self.turns else 1)


def started(rank, world, steps, turns):
    """Trains under auto, where the preset "safe" is the only one that may be taken. Returns what was said, the plan,
    and of each step the start and the steps of its compressor, None without one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "within", lambda bound: ["safe"])
        for module in (presets, codecs):
            patch.setattr(module, "START", START)
        instruments = Prescribed(SLOW, Seconds(turns))
        model, opt = training.build("Mlp", ADAMW, {})
        seen = []
        with Heard() as said:
            engine = dear.attach(model, opt, compressor=Auto("4%", instruments=instruments))
            for step in range(steps):
                training.plain_step(model, opt, rank, step)
                instruments.step_ends(engine)
                now = engine.compressor
                seen.append(None if now is None else (now.start.given, now.step))
        plan, state = engine.plan, engine.state_dict()
        engine.detach()

        for given in (plan, None):
            model, opt = training.build("Mlp", ADAMW, {})
            chooser = Auto("4%", given, instruments=Prescribed(SLOW, Seconds(0)))
            engine = dear.attach(model, opt, compressor=chooser)
            if given is not None:
                assert (engine.compressor.start.given, engine.compressor.step) == (START, 0), "a plan begins with it"
            engine.load_state_dict(state)
            assert (engine.compressor.start.given, engine.compressor.step) == seen[-1], "and goes on where it was"
            engine.detach()
    return said, plan, seen


def test_a_trial_shows_the_steady_state_and_training_has_the_start(pool2):
    (said, plan, seen), _ = pool2.run(started, auto.MOST + 4, 1000)
    compressed = [one for one in seen if one is not None]
    tried = [one for one in compressed if one[0] == 0]
    assert tried and plan["compressor"] == "safe"
    settled = compressed[len(tried) :]
    assert settled == [(START, step + 1) for step in range(len(settled))] != [], "from its first step on"
    assert "1e+03 ms a step measured" in said[0]
    assert f"once the {START} steps are over in which it sends more" in said[0]


@pytest.mark.slow
def test_the_end_of_a_start_is_no_change_and_another_search_begins_none(pool2):
    turns = auto.MOST + START + 100
    (said, plan, seen), _ = pool2.run(started, turns + 5 * 15 + auto.MOST + 20, turns)
    assert [sentence.partition(":")[0] for sentence in said[1:2]] == ["The steps have taken another time for a minute"]
    assert len(said) == 3 and plan["compressor"] == "safe"
    given, steps = seen[-1]
    assert given == START < steps, "it is behind its start"
    own = [one for one in seen[turns:] if one is not None]
    assert {start for start, _ in own} == {START}, "also in trials"
