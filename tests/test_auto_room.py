"""Where memory runs out in a trial of ``auto``: what has no room is tried on no rank, and errors are told what was."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import training
from auto_instruments import FAST, Prescribed
from test_auto import ADAMW, chosen, ddp_is_faster, nothing_differs

import dear
from dear.choosing import Steering
from planner import auto, room
from planner.auto import Auto
from planner.deciding import PLAIN, Way
from planner.instruments import Instruments

SAID = r'compressor="auto" ran out of memory in a trial of plain DDP: give update= and compressor= that fit, or'
GONE = torch.OutOfMemoryError("CUDA out of memory.")


def test_what_has_no_room_on_one_rank_is_tried_on_none(pool2):
    first, second = pool2.run(chosen, FAST, ddp_is_faster, auto.MOST + 4, 0.0, None, {"room": [float("inf"), 0]})
    (plan, said, asked), (other, _, others) = first, second
    assert plan == other and asked == others and plan["update"] == "sharded", "plain DDP would have been the fastest"
    assert {update for update, *_ in asked} == {"sharded"} and len(set(asked)) > 2, "sizes of what has room are tried"
    assert said[0].startswith(
        'compressor="auto": plain DDP is not tried (rank 1 has no room for it: OutOfMemoryError: '
    )
    assert said[0].endswith("bytes).") and "manual" not in said[0] and said[-1].startswith("auto chose DeAR, sharded")


def test_what_fails_otherwise_is_not_called_a_want_of_memory(pool2):
    _, said, asked = pool2.run(chosen, FAST, ddp_is_faster, auto.MOST + 4, 0.0, None, {"room": [float("inf"), None]})[0]
    assert {update for update, *_ in asked} == {"sharded"}
    why = "(rank 1 could not find out whether it has room for it: TypeError: '>' not supported"
    assert said[0].startswith(f'compressor="auto": plain DDP is not tried {why}')


def needed(rank, world):
    """Of AdamW's two numbers for each parameter, in halves on two ranks, by each update strategy and back."""
    model, opt = training.build("Mlp", ADAMW, {})
    instruments = Prescribed(FAST, nothing_differs)
    engine = dear.attach(model, opt, compressor=Auto(instruments=instruments))
    for step in range(2):
        training.plain_step(model, opt, rank, step)
    steering, size = engine._steering, 4 * sum(param.numel() for param in model.parameters())
    missing = engine.stats()["optimizer_state_bytes"]  # as much as is here
    found = [room.needs(steering, way) for way in (Way(PLAIN), Way("owned"), Way("replicated", "power:4"))]
    assert found == [(missing + size, missing), (missing + size, 0), (missing + size, missing + size)]
    assert missing == pytest.approx(size, rel=0.1), "half of two numbers for each parameter"
    engine.detach()


def test_what_a_setting_needs_is_counted(pool2):
    pool2.run(needed)


def test_the_parts_of_more_ranks_are_missing():
    param = torch.nn.Parameter(torch.zeros(10))
    steering = SimpleNamespace(
        ground=SimpleNamespace(
            group=SimpleNamespace(size=lambda: 4),
            model=SimpleNamespace(module=SimpleNamespace(parameters=lambda: [param])),
        ),
        engine=SimpleNamespace(stats=lambda: {"optimizer_state_bytes": 20}, update="sharded"),
    )
    assert room.needs(steering, Way(PLAIN)) == (3 * 20 + 40, 3 * 20)
    steering.engine.update = "replicated"
    assert room.needs(steering, Way("sharded")) == (40, 0), "the whole state is here"


def built(rank, world):
    """The memory that was reserved was too little, on every rank."""
    model, opt = training.build("Mlp", ADAMW, {})
    instruments = Prescribed(FAST, ddp_is_faster)
    engine = dear.attach(model, opt, compressor=Auto(instruments=instruments))

    former = Steering.switch

    def no_memory(self, setting):
        if setting.update != PLAIN:
            return former(self, setting)
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    Steering.switch = no_memory
    try:
        with pytest.raises(RuntimeError, match=SAID) as raised:
            for step in range(auto.MOST):
                training.plain_step(model, opt, rank, step)
                instruments.step_ends(engine)
        assert "DefaultCPUAllocator" in str(raised.value.__cause__)
    finally:
        Steering.switch = former
    engine.detach()


def test_memory_that_runs_out_while_parts_are_built_is_one_sentence(pool2):
    pool2.run(built)


def ends(rank, world):
    """The user's own step runs out of memory in a trial, and the context of the engine ends by it."""
    before, error = sys.excepthook, MemoryError()
    model, opt = training.build("Mlp", ADAMW, {})
    instruments = Prescribed(FAST, ddp_is_faster)
    with pytest.raises(MemoryError), dear.attach(model, opt, compressor=Auto(instruments=instruments)) as engine:
        for step in range(auto.MOST):
            training.plain_step(model, opt, rank, step)
            instruments.step_ends(engine)
            if engine.update == PLAIN:
                assert sys.excepthook is not before
                raise error
    assert sys.excepthook is before, "nothing is left behind"
    return getattr(error, "__notes__", None)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors cannot be told anything")
def test_an_error_that_ends_the_context_in_a_trial_is_told_of_it(pool2):
    for notes in pool2.run(ends):
        assert notes == [room.sentence(Way(PLAIN))]


def test_an_error_that_ends_the_program_is_told_of_the_trial(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: seen.append(error))
    tried = [None]
    with room.told(lambda: tried[0]):
        ours = sys.excepthook
        for way, error in (
            (None, MemoryError()),
            (Way(PLAIN), MemoryError()),
            (Way(PLAIN), ValueError("out of memory")),
        ):
            tried[0] = way
            ours(type(error), error, None)
            ours(type(error), error, None)
    assert [getattr(error, "__notes__", []) for error in seen[::2]] == [[], [room.sentence(Way(PLAIN))], []]
    late = MemoryError()
    ours(MemoryError, late, None)
    assert seen[-1] is late and not hasattr(late, "__notes__"), "somebody's own hook may still call it"


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (GONE, True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("Rank 1 is silent."), False),
        (OSError("out of memory"), False),
        (None, False),
    ],
)
def test_what_is_want_of_memory(error, is_one):
    assert room.ran_out(error) == is_one


def test_memory_of_the_host_is_reserved_in_parts():
    instruments, host = Instruments(), torch.device("cpu")
    instruments.reserve(host, 0)
    instruments.reserve(host, 3 * (1 << 26) + 1)
    assert instruments.in_steps(host) == 0
