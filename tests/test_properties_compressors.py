"""Compressors over any shapes: nothing is lost, all ranks decode the same bits, and a saved state goes on."""

import pytest
import torch
from compressing import KINDS, Prescribed, attach, backward, everyones, gradients, kept
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from silence import known

#: One parameter: a vector, a matrix, a convolution; ones, and sizes that end within a word or a block.
SHAPE = st.one_of(
    st.tuples(st.integers(1, 700)),
    st.tuples(st.integers(1, 90), st.integers(1, 90)),
    st.tuples(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 3]), st.sampled_from([1, 3])),
)
SHAPES = st.lists(SHAPE, min_size=1, max_size=5).map(lambda all_: {f"p{i}": shape for i, shape in enumerate(all_)})
OPTIONS = st.fixed_dictionaries({"start_step": st.sampled_from([0, 0, 2]), "seed": st.integers(0, 3)})
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, options):
    return KINDS[kind](min_compression_ratio=0.1, **options)


def nothing_is_lost(rank, world, kind, shapes, options, cap):
    """What was applied and what is kept is what was given; every rank applies the same bits."""
    compressor = make(kind, options)
    model = attach(compressor, net=Prescribed(shapes), bucket_cap_mb=cap)
    balance = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for step in range(4):
        given = [gradients(r, step, shapes) for r in range(world)]
        result = backward(model, given[rank])
        for name in shapes:
            balance[name] += sum(grads[name].double() for grads in given) - world * result[name].double()
        for other in everyones(result):
            assert all(torch.equal(other[name], result[name]) for name in shapes), "replicas differ"
    errors = kept(compressor)
    for name, shape in shapes.items():
        left = balance[name] - (errors[name].view(shape) if name in errors else 0)
        scale = max(1.0, float(balance[name].abs().max()))
        assert left.abs().max() < 1e-4 * scale, (name, float(left.abs().max()))


@each_kind
@examples(8)
@given(shapes=SHAPES, options=OPTIONS, cap=st.sampled_from([0.001, 0.01, 25.0]))
def test_nothing_is_lost_and_replicas_agree(pool2, kind, shapes, options, cap):
    pool2.run(nothing_is_lost, kind, shapes, options, cap)


@pytest.mark.slow
@each_kind
@examples(3)
@given(shapes=SHAPES, options=OPTIONS, cap=st.sampled_from([0.001, 25.0]))
def test_nothing_is_lost_on_four_ranks(pool4, kind, shapes, options, cap):
    pool4.run(nothing_is_lost, kind, shapes, options, cap)


def goes_on(rank, world, kind, shapes, options, cap, saved_at, gather):
    """A new compressor with the saved state gives the bits that the old one gives."""
    compressor = make(kind, options)
    model = attach(compressor, net=Prescribed(shapes), bucket_cap_mb=cap)
    for step in range(saved_at):
        backward(model, gradients(rank, step, shapes))
    state = compressor.state_dict(gather=gather)
    again = compressor.state_dict(gather=gather)
    assert_same(again, state)
    want = [backward(model, gradients(rank, step, shapes)) for step in range(saved_at, saved_at + 3)]

    other = make(kind, options)
    resumed = attach(other, net=Prescribed(shapes), bucket_cap_mb=cap)
    other.load_state_dict(state)
    assert_same(other.state_dict(gather=gather), state)
    for number, step in enumerate(range(saved_at, saved_at + 3)):
        have = backward(resumed, gradients(rank, step, shapes))
        for name in shapes:
            assert torch.equal(have[name], want[number][name]), (step, name)


def assert_same(have, want):
    """Equal in every tensor and number."""
    assert type(have) is type(want), (have, want)
    if isinstance(want, dict):
        assert have.keys() == want.keys()
        for key in want:
            assert_same(have[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(have) == len(want)
        for one, other in zip(have, want, strict=True):
            assert_same(one, other)
    elif isinstance(want, torch.Tensor):
        assert torch.equal(have, want)
    else:
        assert have == want, (have, want)


@pytest.mark.parametrize("kind", [known(f"goes on-{kind}", kind) for kind in KINDS])
@examples(6, shrink=False)
@given(
    shapes=SHAPES, options=OPTIONS, cap=st.sampled_from([0.001, 0.01, 25.0]), saved_at=st.integers(0, 4),
    gather=st.booleans(),
)  # fmt: skip
def test_a_saved_state_goes_on(pool2, kind, shapes, options, cap, saved_at, gather):
    pool2.run(goes_on, kind, shapes, options, cap, saved_at, gather)
