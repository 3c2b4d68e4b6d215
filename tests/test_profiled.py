"""torch's profiler shows every phase of every fusion group, and what waits for it; without it nothing is added."""

from __future__ import annotations

import gc
import re

import pytest
import training
from threads import threads
from torch import optim
from torch.profiler import ProfilerActivity, profile

import compress
import dear

SGD = (optim.SGD, {"lr": 0.01})
LANES = ("reduce-scatter", "all-gather")
SMALL = 0.002  # MiB: several groups in a small model


def spans_of(rank, world, compressed, hooked, how):
    """The names of ours that a profiler has seen in two steps, with their threads and times in µs."""
    model, opt = training.build("Mlp", SGD, {"bucket_cap_mb": SMALL} if hooked else {})
    engine, compressor = None, compress.PowerSGD(rank=2) if compressed else None
    if hooked:
        compress.register(model, compressor)
    else:
        engine = dear.attach(model, opt, compressor=compressor, bucket_cap_mb=SMALL, **how)
    for step in range(3):
        training.plain_step(model, opt, rank, step)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for step in range(2):
            training.plain_step(model, opt, rank, step)
        if engine is not None:
            engine.synchronize()
    groups = engine.stats()["fusion_groups"] if engine is not None else 0
    if engine is not None:
        engine.detach()
    own = [event for event in seen.events() if event.name.startswith("dear: ")]
    return groups, [(event.name, event.thread, event.time_range.start, event.time_range.end) for event in own]


def check(groups, spans, wanted):
    names = {name for name, *_ in spans}
    missing = {f"dear: {name} {group}" for name in wanted for group in range(groups)} - names
    assert groups > 1 and not missing, f"missing: {sorted(missing)}; seen: {sorted(names)}"
    threads = {}
    for name, thread, start, end in spans:
        threads.setdefault(re.sub(r",.*", "", name), set()).add(thread)
        assert end >= start, name
    on_lanes = [threads[f"dear: {lane}"] for lane in LANES]
    assert all(len(each) == 1 for each in on_lanes) and on_lanes[0] != on_lanes[1], "a row for each lane"
    assert not (threads["dear: wait"] & set.union(*on_lanes)), "who waits has a row of its own"
    begun = {name: start for name, _, start, _ in spans}
    ended = {name: end for name, _, _, end in spans}
    for lane in LANES:
        submitted = begun[f"dear: submit, {lane} of fusion group 0"]
        assert submitted <= ended[f"dear: {lane}, fusion group 0"], "one clock for all rows"


COMMON = tuple(f"{what} fusion group" for what in ("reduce-scatter,", "all-gather,", "wait, reduce-scatter of",
               "wait, all-gather of", "submit, reduce-scatter of", "submit, all-gather of", "update,"))  # fmt: skip


@pytest.mark.parametrize("update", ["sharded", "owned", "replicated"])
def test_a_profiler_shows_each_phase_of_each_fusion_group(pool2, update):
    for groups, spans in pool2.run(spans_of, False, False, {"update": update}):
        check(groups, spans, COMMON)


def test_a_profiler_shows_what_a_compressor_does(pool2):
    for groups, spans in pool2.run(spans_of, True, False, {}):
        check(groups, spans, (*COMMON, "encode, fusion group", "decode, fusion group"))


def test_a_profiler_shows_a_plain_hook(pool2):
    for _, spans in pool2.run(spans_of, True, True, {}):
        names = {name for name, *_ in spans}
        wanted = {f"dear: {what} bucket {bucket}" for bucket in (0, 1) for what in (
            "submit,", "wait,", "encode,", "reduce-scatter,", "all-gather,", "decode,")}  # fmt: skip
        assert wanted <= names, sorted(wanted - names)


def stopped_in_flight(rank, world):
    """A profiler that stops while exchanges are under way, twenty times, and the last one's are not its own."""
    model, opt = training.build("Mlp", SGD, {})
    engine = dear.attach(model, opt, bucket_cap_mb=SMALL)
    for step in range(2):
        training.plain_step(model, opt, rank, step)
    counts = []
    for step in range(20):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            training.plain_step(model, opt, rank, step)  # its all-gathers go on
        counts.append(sum(event.name.startswith("dear: submit, all-gather") for event in seen.events()))
    groups = engine.stats()["fusion_groups"]
    engine.detach()
    return counts, groups


def test_a_profiler_may_stop_while_exchanges_move(pool2):
    for counts, groups in pool2.run(stopped_in_flight):
        assert counts == [groups] * 20


def unprofiled(rank, world):
    """The threads that come with an engine, and with its first profiled steps."""
    model, opt = training.build("Mlp", SGD, {})
    with profile(activities=[ProfilerActivity.CPU]):  # torch's own threads come with a process's first one
        training.plain_step(model, opt, rank, 0)
    gc.collect()
    before = threads()
    with dear.attach(model, opt, bucket_cap_mb=SMALL):
        for step in range(3):
            training.plain_step(model, opt, rank, step)
        without = threads()
        with profile(activities=[ProfilerActivity.CPU]):
            training.plain_step(model, opt, rank, 3)
            training.plain_step(model, opt, rank, 4)
        return without - before, threads() - without


def test_without_a_profiler_there_are_no_rows(pool2):
    for without, more in pool2.run(unprofiled):
        assert set(without) == {"dear all-gather", "dear reduce-sca"}, "the lanes alone"
        assert more == {"all-gather": 1, "reduce-scatter": 1}
