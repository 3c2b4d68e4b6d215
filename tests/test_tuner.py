"""The tuner of fusion groups: takes the fastest size, on all ranks alike, and changes nothing else."""

import pytest
import torch
import training
from torch import optim

import compress
import dear

SGD = (optim.SGD, {"lr": 0.1, "momentum": 0.9})
SIZES = [0.001, 0.002, 0.004]


class Clock:
    """Seconds as a test prescribes them: how long a step takes by the engine's size, by trials of that size."""

    def __init__(self, engine, by_size):
        self.engine, self.by_size, self.now = engine, by_size, 0.0

    def __call__(self):
        return self.now

    def step(self):
        size = min(self.by_size, key=lambda size: abs(size - self.engine.bucket_cap_mb))
        times = self.by_size[size]
        self.now += times.pop(0) if len(times) > 1 else times[0]


def tuned(rank, world, update, by_rank, steps, rounds):
    plain, plain_opt = training.build("Mlp", SGD, {})
    model, opt = training.build("Mlp", SGD, {})
    engine = dear.attach(model, opt, update=update, bucket_cap_mb=0.002)
    clock = Clock(engine, {size: list(times) for size, times in by_rank[rank].items()})
    tuner = dear.FusionTuner(engine, SIZES, steps=steps, rounds=rounds, clock=clock)
    took = 0
    for step in range(rounds * len(SIZES) * (steps + 1) + 3):
        training.plain_step(plain, plain_opt, rank, step)
        training.plain_step(model, opt, rank, step)
        clock.step()
        took += tuner.tuning
        tuner.step()
    engine.synchronize()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other), "training under the tuner is not the same training"
    assert not tuner.tuning
    assert engine.bucket_cap_mb == pytest.approx(tuner.best, rel=0.01)
    engine.detach()
    return tuner.best, took, tuner.times


@pytest.mark.parametrize("update", ["sharded", "replicated"])
def test_the_fastest_size_stays(pool2, update):
    by_size = {0.001: [3.0], 0.002: [1.0], 0.004: [2.0]}
    for best, took, times in pool2.run(tuned, update, [by_size, by_size], 2, 2):
        assert best == 0.002
        assert took == 2 * 3 * 3, "two rounds of three sizes, two timed steps and one more each"
        assert times == {0.001: 3.0, 0.002: 1.0, 0.004: 2.0}


def test_the_slowest_rank_decides_and_all_follow(pool2):
    first = {0.001: [1.0], 0.002: [2.0], 0.004: [2.5]}
    second = {0.001: [4.0], 0.002: [3.0], 0.004: [2.6]}
    assert [best for best, *_ in pool2.run(tuned, "sharded", [first, second], 2, 1)] == [0.004, 0.004]


def test_neither_the_step_of_the_change_nor_one_slow_turn_decides(pool2):
    # Three steps a trial, of which the first is not timed: slow there, and in the whole second trial of three.
    good, slow = [9.0, 1.0, 1.0], [9.0, 9.0, 9.0]
    by_size = {0.001: [2.0], 0.002: [*good, *slow, *good, *good], 0.004: [2.0]}
    assert [best for best, *_ in pool2.run(tuned, "sharded", [by_size, by_size], 2, 3)] == [0.002, 0.002]


def refused(rank, world):
    model, opt = training.build("Mlp", SGD, {})
    engine = dear.attach(model, opt)
    with pytest.raises(ValueError, match="positive number of MiB, not 0"):
        dear.FusionTuner(engine, [1, 0])
    with pytest.raises(ValueError, match="different numbers of MiB"):
        dear.FusionTuner(engine, [1, 1])
    with pytest.raises(ValueError, match="different numbers of MiB"):
        dear.FusionTuner(engine, [])
    with pytest.raises(ValueError, match="at least 1, not 0 and 3"):
        dear.FusionTuner(engine, steps=0)
    with pytest.raises(ValueError, match=r"Ranks 0 and 1 disagree on steps \(3 and 4\).*dear\.FusionTuner\(\)"):
        dear.FusionTuner(engine, steps=3 + rank)
    size = engine.bucket_cap_mb
    assert dear.FusionTuner(engine).sizes == [size / 2, size, size * 2, size * 4]
    engine.detach()


def test_refusals(pool2):
    pool2.run(refused)


def skipping(rank, world):
    """Every third step is skipped, as a GradScaler's, and its gradients are zeroed before or behind the tuner."""
    for zeroed_first in (True, False):
        model, opt = training.build("Mlp", SGD, {})
        engine = dear.attach(model, opt, bucket_cap_mb=0.002)
        tuner = dear.FusionTuner(engine, SIZES, steps=2, rounds=1)
        for step in range(20):
            training.loss_of(model, rank, step).backward()
            if step % 3 != 2:
                opt.step()
            if zeroed_first:
                opt.zero_grad()
            tuner.step()
            opt.zero_grad()
        assert not tuner.tuning
        engine.detach()


def test_steps_that_are_skipped_do_not_count(pool2):
    pool2.run(skipping)


def before_the_step(rank, world):
    model, opt = training.build("Mlp", SGD, {})
    engine = dear.attach(model, opt, bucket_cap_mb=0.002)
    tuner = dear.FusionTuner(engine, SIZES, steps=2, rounds=1)
    training.loss_of(model, rank, 0).backward()
    with pytest.raises(RuntimeError, match=r"100 times in a row .* call it behind optimizer\.step\(\)"):
        for _ in range(100):
            tuner.step()
    opt.step()
    engine.detach()


def test_a_tuner_that_is_called_before_the_step_says_so(pool2):
    pool2.run(before_the_step)


def compressed(rank, world):
    model, opt = training.build("Mlp", SGD, {})
    engine = dear.attach(model, opt, compressor=compress.ACPSGD())
    with pytest.raises(RuntimeError, match="attach with each bucket_cap_mb in turn"):
        dear.FusionTuner(engine)
    engine.detach()


def test_a_compressor_is_refused(pool2):
    pool2.run(compressed)
