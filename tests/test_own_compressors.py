"""Compressors written in Python, driven by the native pipeline: each way a payload can travel."""

import pytest
import torch
from compressing import SHAPES, attach, backward, gradients, kept
from own_compressors import Everything, Owned, RandomK

import compress


def own_compressor(rank: int, world: int) -> None:
    compressor = RandomK(0.25)
    model = attach(compressor)
    given = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for step in range(5):
        compressor.measure()
        have = backward(model, gradients(rank, step))
        for name in SHAPES:
            given[name] += sum(gradients(r, step)[name].double() for r in range(world)) - world * have[name].double()
        errors = kept(compressor)
        for name in SHAPES:
            assert (given[name].flatten() - errors[name]).abs().max() < 2e-5
    stats = compressor.stats()
    assert stats["bytes_sent"] < 0.26 * stats["dense_bytes"] and stats["steps"] == 5
    assert stats["error_norm"] > 0 and stats["vnmse"] > 0


def test_own_compressor(pool4):
    pool4.run(own_compressor)


def lossless(rank: int, world: int, kind: type[compress.Compressor], named: bool) -> None:
    """What loses nothing gives the mean, and keeps nothing."""
    compressor = kind()
    model = attach(compressor, named)
    for step in range(3):
        have = backward(model, gradients(rank, step))
        for name in SHAPES:
            want = torch.stack([gradients(r, step)[name] for r in range(world)]).mean(0)
            torch.testing.assert_close(have[name], want)
    assert all(not error.any() for error in kept(compressor).values())
    assert compressor.stats()["bytes_sent"] > 0


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("kind", [Everything, Owned])
def test_each_way_to_travel(pool4, kind, named):
    pool4.run(lossless, kind, named)


class TooShort(RandomK):
    """Announces two exchanges and makes one."""

    def compressed_steps(self, group):
        yield next(super().compressed_steps(group))


class Broken(RandomK):
    """Fails on one rank in the third step."""

    def encode(self, group):
        if group.step == 2 and group.rank == 1:
            raise ArithmeticError("no idea")
        return super().encode(group)


def wrong_number(rank: int, world: int) -> None:
    with pytest.raises(RuntimeError, match="announced 2 exchanges and made 1"):
        backward(attach(TooShort(0.25)), gradients(rank, 0))


def fails_on_one_rank(rank: int, world: int) -> None:
    """The rank itself raises its own error, the others one that names it, at once and not after a timeout."""
    model = attach(Broken(0.25))
    for step in range(2):
        backward(model, gradients(rank, step))
    with pytest.raises(ArithmeticError if rank == 1 else RuntimeError, match="no idea" if rank == 1 else "ank 1"):
        backward(model, gradients(rank, 2))


@pytest.mark.parametrize("case", [wrong_number, fails_on_one_rank])
def test_mistakes_in_one_are_errors(pool2, case):
    pool2.run(case)
