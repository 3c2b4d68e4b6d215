"""Where the setting changes, lanes stay: no thread, no socket, no process group more than the setting needs."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path

import pytest
import test_auto_switching as switching
import training
from threads import threads
from torch import optim

import compress
import dear
from dear._assembly import Setting

SMALL = 0.002  # MiB: several groups in a small model


def census():
    """This process's threads of ours by name, and its sockets."""
    gc.collect()
    ours = {name: count for name, count in threads().items() if name.startswith("dear ")}
    sockets = 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            sockets += os.readlink(path).startswith("socket:")
    return ours, sockets


def switches(rank, world, algorithm, settings):
    """What there is after each step, before and after."""
    counts = []
    for _ in range(2):  # what a process has from its first lane on is there in the second round
        model, opt = training.build("Mlp", (optim.SGD, {"lr": 0.01}), {})
        before = census()
        chooser = switching.Scripted({2 * index: setting for index, setting in enumerate(settings)})
        engine = dear.attach(model, opt, compressor=chooser, algorithm=algorithm)
        gather, counts = engine._attached.gather_lane, []
        for step in range(2 * len(settings)):
            training.plain_step(model, opt, rank, step)
            engine.synchronize()
            counts.append(census())
            assert engine._attached.gather_lane is gather, "a setting has a gather lane of its own"
        engine._steering.settled()
        settled = census()
        training.plain_step(model, opt, rank, 99)
        engine.detach()
        del engine, gather, model, opt, chooser
        after = census()
    return before, counts, settled, after


def dense():
    return [Setting("sharded", SMALL), Setting("ddp", 1.0), Setting("replicated", SMALL)] * 3


@pytest.mark.parametrize("algorithm", ["ring", "native"])
def test_dense_settings_share_their_lanes(pool2, algorithm):
    for before, counts, settled, after in pool2.run(switches, algorithm, dense()):
        assert all(each == counts[0] for each in counts), counts
        assert sum(counts[0][0].values()) - sum(before[0].values()) == (2 if algorithm == "ring" else 0)
        assert settled == counts[0] and after[0] == before[0]
        assert algorithm == "native" or after == before, "a lane is left over"


def test_a_setting_that_stays_gives_back_what_it_does_not_use(pool2):
    for before, counts, settled, after in pool2.run(switches, "ring", [*dense(), Setting("ddp", 1.0)]):
        assert sum(settled[0].values()) == sum(counts[-1][0].values()) - 1, "the lane of reduce-scatters is idle"
        assert settled[1] < counts[-1][1] and after == before


def compressed(rank, world):
    settings = [Setting("sharded", SMALL)]
    for _ in range(2):
        settings += [Setting("replicated", 1.0, compress.PowerSGD(rank=2)), Setting("sharded", SMALL)]
    return switches(rank, world, "ring", settings)


def test_what_a_compressor_adds_goes_with_it(pool2):
    for before, counts, settled, after in pool2.run(compressed):
        with_compressor = counts[2:4] + counts[6:8]
        plain = counts[0:2] + counts[4:6] + counts[8:10]
        assert all(each == with_compressor[0] for each in with_compressor), with_compressor
        assert all(each == plain[0] for each in plain) and settled == plain[0], plain
        assert with_compressor[0][0].get("dear decode") == 1, "its lanes and its thread are there"
        assert after == before
