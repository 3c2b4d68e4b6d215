"""Numbers for a dashboard, and the line in the log every so many steps."""

from __future__ import annotations

import logging
import re

import pytest
import training
from torch import optim

import compress
import dear
from dear._summary import sentence

ADAMW = (optim.AdamW, {"lr": 0.01})


class Heard(logging.Handler):
    """What the library says, for as long as it is entered."""

    def __enter__(self):
        self.said = []
        logger = logging.getLogger("dear")
        self.before = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.INFO)
        return self.said

    def emit(self, record):
        self.said.append(record.getMessage())

    def __exit__(self, *_):
        logger = logging.getLogger("dear")
        logger.removeHandler(self)
        logger.setLevel(self.before)


def numbers(rank, world, update):
    model, opt = training.build("Mlp", ADAMW, {})
    attach = {"compressor": compress.PowerSGD(rank=2)} if update == "compressed" else {"update": update}
    with dear.attach(model, opt, **attach) as engine:
        sent = []
        for step in range(4):
            training.plain_step(model, opt, rank, step)
            sent.append(engine.stats()["bytes_sent"])
        stats = engine.stats()
    assert stats["step_bytes_sent"] > 0
    if update != "compressed":  # whose second phases may begin between the end of a step and the look at it
        assert stats["step_bytes_sent"] == sent[-1] - sent[-2]
    assert stats["steps"] == 4 and stats["step_ms"] > 0
    assert stats["exposed_ms"] == pytest.approx(stats["wait_reduce_scatter_ms"] + stats["wait_all_gather_ms"])
    return stats


@pytest.mark.parametrize("update", ["sharded", "owned", "replicated", "compressed"])
def test_stats_are_numbers(pool2, update):
    for stats in pool2.run(numbers, update):
        odd = {name: value for name, value in stats.items() if type(value) not in (int, float)}
        assert not odd, "a dashboard takes no such thing"


def logged(rank, world, attach):
    plain, plain_opt = training.build("Mlp", ADAMW, {})
    model, opt = training.build("Mlp", ADAMW, {})
    with Heard() as said, dear.attach(model, opt, **attach) as engine:
        training.plain_step(plain, plain_opt, rank, 0)
        training.plain_step(model, opt, rank, 0)
        assert not said, "nothing is said until it is asked for"
        engine.log_every(3)
        for step in range(1, 10):
            want = training.plain_step(plain, plain_opt, rank, step)
            assert training.plain_step(model, opt, rank, step) == want
        engine.log_every(0)
        spoken = len(said)
        for step in range(5):
            training.plain_step(model, opt, rank, step)
        assert len(said) == spoken
        with pytest.raises(ValueError, match=r"steps of log_every\(\) must be a whole number, 0 or more, not -1"):
            engine.log_every(-1)
        with pytest.raises(ValueError, match=r"disagree on steps of log_every\(\)"):
            engine.log_every(3 + rank)
    return said


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_a_line_every_so_many_steps(pool2, update):
    first, second = pool2.run(logged, {"update": update})
    assert not second, "rank 0 speaks for all"
    assert [re.match(r"Step (\d+): [\d.e+]+ ms a step over (\d)", line).groups() for line in first] == [
        ("3", "3"), ("6", "3"), ("9", "3"),
    ], first  # fmt: skip
    assert all(re.search(r"MB sent; the slowest rank is [01], with ", line) for line in first)


def test_the_slowest_rank_is_the_one_that_waits_least():
    said = sentence(100, 50, [[0.1, 0.03, 0.02, 4e6], [0.1, 0.001, 0.002, 4e6]], waits=True)
    assert said == (
        "Step 100: 100 ms a step over 50, of which up to 30 ms waited for reduce-scatters and 20 ms for all-gathers; "
        "4 MB sent; the slowest rank is 1, with 97 ms besides."
    )
    assert sentence(100, 50, [[0.1, 0.0, 0.0, 4e6]] * 2, waits=False).endswith("4 MB sent.")


def switched(rank, world):
    """A summary that is under way when the setting changes."""
    import test_auto_switching as switching

    from dear._assembly import Setting

    model, opt = training.build("Mlp", ADAMW, {})
    settings = {2: Setting("ddp", 1.0), 4: Setting("replicated", 0.002), 6: Setting("sharded", 0.002)}
    with Heard() as said, dear.attach(model, opt, compressor=switching.Scripted(settings)) as engine:
        engine.log_every(1)
        for step in range(8):
            training.plain_step(model, opt, rank, step)
    return said


def test_it_goes_on_where_the_setting_changes(pool2):
    first, _ = pool2.run(switched)
    assert [int(re.match(r"Step (\d+)", line)[1]) for line in first] == list(range(1, 9))


def test_on_one_rank(pool1):
    (said,) = pool1.run(alone)
    assert len(said) == 1 and said[0].startswith("Step 2: ")


def alone(rank, world):
    model, opt = training.build("Mlp", ADAMW, {})
    with Heard() as said, dear.attach(model, opt) as engine:
        engine.log_every(2)
        for step in range(3):
            training.plain_step(model, opt, rank, step)
    return said
