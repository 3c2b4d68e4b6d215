"""What may be assigned to a compressor, and which options it takes: a name that means nothing is refused."""

from __future__ import annotations

import re

import pytest
import torch
from compressing import attach, backward, gradients
from own_compressors import Everything, RandomK
from refusing import refused

import compress


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("rnk", 16, "PowerSGD has no option rnk, so assigning it would change nothing: assign rank"),
        ("ranks", 16, "ranks of PowerSGD is a method, which cannot be assigned: assign rank"),
        ("step", 3, "step of PowerSGD is computed, which cannot be assigned: its options are rank, rank_of"),
        ("start", 4, "start of PowerSGD is kept by the library.*: make another compressor with start_step="),
        ("binding", None, "binding of PowerSGD is kept by the library.*: its options are rank, rank_of, factor_dtype"),
        (
            "feedback",
            None,
            "feedback of PowerSGD is kept by the library.*: make another compressor with error_feedback=",
        ),
        ("groups", {}, "groups of PowerSGD is kept by the library"),
        ("stages", [4], "stages of PowerSGD is kept by the library"),
        ("learning_rate", 0.1, "PowerSGD has no option learning_rate.*: its options are rank,"),
    ],
)
def test_a_name_that_is_no_option_is_refused(name, value, match):
    compressor = compress.PowerSGD(rank=4)
    with refused(AttributeError, match):
        setattr(compressor, name, value)
    assert compressor.rank == 4 and compressor.start.native.step == 0


@pytest.mark.parametrize(
    "made",
    [compress.TopK(), compress.Dense(), compress.SignSGD(), compress.ACPSGD(), compress.LocalPowerSGD()],
    ids=lambda made: type(made).__name__,
)
def test_every_class_of_the_library_refuses_unknown_names(made):
    with refused(AttributeError, f"{type(made).__name__} has no option colour"):
        made.colour = "red"
    made._mine = 1  # private names are nobody's mistake
    made.error_feedback = False
    made.seed = 3


class Careful(RandomK):
    """Has a look at what is assigned, keeps things of its own, and one option as a property."""

    def __init__(self, density: float, **options: object) -> None:
        self.early = 1
        super().__init__(density, **options)
        self.calls = 0

    def __setattr__(self, name, value):
        super().__setattr__(name, value)

    @property
    def share(self):
        return self.density

    @share.setter
    def share(self, value):
        self.density = value

    def encode(self, group):
        self.calls += 1
        self.last = group.step  # new, while it serves a model
        return super().encode(group)


def users_own(rank, world):
    """A subclass's attributes are its own business, also while it serves a model; what the library needs is not."""
    compressor = Careful(0.5)
    model = attach(compressor)
    for step in range(2):
        backward(model, gradients(rank, step))
    assert compressor.calls > 0 and compressor.last == 1 and compressor.early == 1
    compressor.share = 0.25
    compressor.noted = "here"
    compressor.ratio = lambda group: 4.0
    for name, value in (("start", 4), ("groups", {}), ("binding", None), ("feedback", None), ("ranks", 4), ("step", 3)):
        with refused(AttributeError, f"{name} of Careful is .*cannot be assigned"):
            setattr(compressor, name, value)
    backward(model, gradients(rank, 2))


@pytest.mark.parametrize(
    ("made", "name", "value"),
    [
        (compress.PowerSGD(), "start_step", 500),
        (compress.PowerSGD(), "exempt", ["head"]),
        (compress.ACPSGD(), "rank_of", {"head": 2}),
        (compress.LocalPowerSGD(), "factor_dtype", torch.float16),
        (compress.Dense(), "dtype", torch.int4),
        (compress.Dense(torch.int3), "scale", "element"),
        (compress.Dense(torch.int3), "start_dtype", torch.int8),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_read_as_a_compressor_is_made_cannot_be_assigned_afterwards(made, name, value):
    before = getattr(made, name)
    with refused(AttributeError, f"{name} is read as a compressor is made"):
        setattr(made, name, value)
    assert getattr(made, name) is before


def test_a_users_own_class_keeps_what_it_likes(pool2):
    pool2.run(users_own)


def test_a_subclass_cannot_take_the_librarys_names():
    class Mine(Everything):
        def __init__(self) -> None:
            super().__init__()
            self.groups = 3

    with refused(AttributeError, "groups of Mine is kept by the library"):
        Mine()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: compress.PowerSGD(ranks=4), "PowerSGD has no option ranks: it takes rank, rank_of, factor_dtype,"),
        (lambda: compress.TopK(rank=3), "TopK has no option rank: it takes density, selection, slack, error_feedback,"),
        (lambda: compress.Dense(torch.int8, bits=8), "Dense has no option bits: it takes dtype, scale,"),
        (lambda: compress.SignSGD(votes="mean"), "SignSGD has no option votes: it takes vote, error_feedback,"),
        (lambda: RandomK(0.5, densty=1), "RandomK has no option densty: it takes density, error_feedback,"),
        (lambda: compress.preset("safe", rank=8), 'preset("safe") has no option rank: it takes dtype, scale,'),
        (lambda: compress.preset("fast", warmup=8), 'preset("fast") has no option warmup: it takes rank,'),
    ],
)
def test_a_keyword_that_is_no_option_is_named_with_those_that_are(make, match):
    with refused(TypeError, re.escape(match)):
        make()


@pytest.mark.parametrize(
    "make",
    [
        compress.PowerSGD,
        compress.SignSGD,
        compress.TopK,
        lambda **options: compress.Dense(torch.int8, **options),
        lambda **options: compress.SignSGD(vote="majority", **options),
    ],
)
@pytest.mark.parametrize("given", ["no", 0, 1])
def test_error_feedback_is_true_or_false(make, given):
    with refused(ValueError, f"error_feedback must be True or False, not {given!r}"):
        make(error_feedback=given)


def test_no_word_on_error_feedback_is_allowed_where_the_class_chooses():
    assert compress.SignSGD(error_feedback=None).error_feedback
    assert not compress.SignSGD(vote="majority", error_feedback=None).error_feedback
    assert compress.Dense(torch.int8, error_feedback=None).error_feedback
