"""Gradients in 3 bits with a scale for each element: its mean squares are equal everywhere, saved, and rolled back."""

import copy

import pytest
import torch
import training
from compressing import SHAPES, Prescribed, attach, backward, everyones, gradients
from owners_golden import EightBits, FewBits
from place import place
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
import dear
from benchmarks.training.strategies import StrategyError, parse_strategies
from compress import reference_levels


def compressor(**options):
    return compress.Dense(torch.int3, scale="element", **{"min_compression_ratio": 0.2, "exempt": (), **options})


def same_everywhere(one) -> dict[str, torch.Tensor]:
    """The mean squares, after a look at those of all ranks."""
    named = {name: mean.cpu() for name, mean in one.state_dict()["named"].items()}
    for other in everyones(named):
        assert other.keys() == named.keys() and all(torch.equal(other[name], named[name]) for name in named)
    return named


def resumed(rank: int, world: int, options: dict) -> None:
    """A run that goes on from any step has the same results, bit for bit."""
    original = compressor(**options)
    model, states, results = attach(original), [], []
    for step in range(6):
        states.append(original.state_dict(gather=True))
        results.append(backward(model, gradients(rank, step)))
    named = same_everywhere(original)
    assert named.keys() == SHAPES.keys() and all(mean.max() > 0 for mean in named.values())
    for begin in (1, 3):
        again = compressor(**options)
        again.load_state_dict(states[begin])
        model = attach(again)
        for step in range(begin, 6):
            have = backward(model, gradients(rank, step))
            assert all(torch.equal(have[name], results[step][name]) for name in SHAPES), (begin, step)
    with pytest.raises(ValueError, match="saved with the options"):
        compress.Dense(torch.int3).load_state_dict(states[3])
    states[3]["ranks"][rank]["named"]["first"] = torch.zeros(1).double()
    with pytest.raises(ValueError, match="the mean squares of first must be a flat float32 tensor"):
        compressor(**options).load_state_dict(states[3])


@pytest.mark.parametrize("options", [{}, {"start_step": 2, "start_dtype": torch.int8}], ids=["", "start"])
def test_a_saved_state_goes_on(pool2, options):
    pool2.run(resumed, options)


def saved(rank: int, world: int) -> dict:
    one = compressor()
    model = attach(one)
    for step in range(3):
        backward(model, gradients(rank, step))
    return one.state_dict(gather=True)


def taken(rank: int, world: int, state: dict) -> None:
    """Of another number of ranks: the mean squares stand as they were, on all, and go on from there."""
    one = compressor()
    one.load_state_dict(state)
    before = state["ranks"][0]["named"]
    loaded = same_everywhere(one)
    assert loaded.keys() == before.keys() and all(torch.equal(loaded[name], before[name]) for name in before)
    have = backward(attach(one), gradients(rank, 3))
    for name, mean in same_everywhere(one).items():
        assert torch.equal(mean, reference_levels.learned(before[name], have[name].flatten()))


def test_another_world_size_goes_on_with_the_same_scales(pool2, pool3):
    pool3.run(taken, pool2.run(saved)[0])


def skipped(rank: int, world: int, nonfinite: str) -> None:
    """A step in which one rank's gradient is not finite changes no scale, on any rank."""
    one = compressor(nonfinite=nonfinite)
    model = attach(one)
    for step in range(3):
        backward(model, gradients(rank, step))
    before = same_everywhere(one)
    grads = gradients(rank, 3)
    if rank == 1:
        grads["first"][0, 0] = torch.nan
    backward(model, grads)
    after = same_everywhere(one)
    assert all(torch.equal(after[name], before[name]) for name in before)
    backward(model, gradients(rank, 4))
    assert not torch.equal(same_everywhere(one)["first"], before["first"])


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_a_skipped_step_changes_no_scale(pool2, nonfinite):
    pool2.run(skipped, nonfinite)


def under_the_schedule(rank: int, world: int) -> None:
    """Replicas and mean squares stay equal, and a resumed run is the run that would have been."""
    model, opt = training.build("Mlp", training.SGD, {})
    one = compressor()
    with dear.attach(model, opt, compressor=one, bucket_cap_mb=0.002) as engine:
        for step in range(3):
            training.plain_step(model, opt, rank, step)
        engine.synchronize()
        state = one.state_dict(gather=True)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        momenta = copy.deepcopy(opt.state_dict())
        training.plain_step(model, opt, rank, 3)
        engine.synchronize()
        want = {name: value.clone() for name, value in model.state_dict().items()}
    same_everywhere(one)
    model, opt = training.build("Mlp", training.SGD, {})
    model.load_state_dict(weights)
    opt.load_state_dict(momenta)
    again = compressor()
    again.load_state_dict(state)
    with dear.attach(model, opt, compressor=again, bucket_cap_mb=0.002) as engine:
        training.plain_step(model, opt, rank, 3)
        engine.synchronize()
        have = model.state_dict()
    assert all(torch.equal(have[name], want[name]) for name in want)


def test_under_the_schedule(pool2):
    pool2.run(under_the_schedule)


#: Two members for each of two places.
PLACED = {"matrix": (150, 200), "vector": (30_000,), "other": (90, 300), "last": (26_000,)}


def between_nodes(rank: int, world: int, dense: int, options: dict) -> None:
    """Two nodes of two: each place rounds its members, and all ranks of a node read them with the same scales, which
    are of the last step before they begin, where there are some."""
    one = compressor(nonfinite="skip", start_step=dense, **options)
    model = DDP(Prescribed(PLACED).to(place()), bucket_cap_mb=100, find_unused_parameters=True)
    compress.register(model, one, hierarchy=2)
    golden = first = None
    for step in range(5):
        spoiled = step == 3
        grads = gradients(rank, step, PLACED)
        if spoiled and rank == 3:
            grads["other"][0, 0] = torch.inf
        have = backward(model, grads)
        (group,) = one.groups.values()
        squares = same_everywhere(one)
        assert squares.keys() == PLACED.keys()
        if spoiled:
            assert not have
            if step == dense - 1:
                golden.squares = torch.cat([squares[name] for name in group.inner.names])
                learns = not options and "other" not in group.inner.names  # the group's compressed steps are undone
                assert golden.squares.any() == learns
            continue
        result = torch.cat([have[name].flatten() for name in group.inner.names])
        if golden is None:
            arguments = group.inner.numel, one.shard_numel(group.inner), 2
            golden, first = FewBits(*arguments, 3, scales=True), EightBits(*arguments, torch.int8)
            golden.errors, golden.owned = first.errors, first.owned
        if step == dense - 1:
            golden.squares = reference_levels.first_squares(result)
        if step < dense and not options:
            continue
        everyone = [gradients(r, step, PLACED) for r in range(world)]
        means = [
            torch.cat([((everyone[r][name] + everyone[r + 1][name]) / 2).flatten() for name in group.inner.names])
            for r in (0, 2)
        ]
        assert torch.equal(result, (first if step < dense else golden).step(means)), step
        for other in everyones(have):
            assert all(torch.equal(other[name], have[name]) for name in PLACED), "replicas differ"


@pytest.mark.parametrize("dense", [0, 2, 4])  # with 4, the last dense step is the one that is skipped
def test_between_nodes(pool4, dense):
    pool4.run(between_nodes, dense, {})


@pytest.mark.parametrize("steps", [2, 4])
def test_between_nodes_behind_steps_in_eight_bits(pool4, steps):
    pool4.run(between_nodes, steps, {"start_dtype": torch.int8})


def test_what_is_refused():
    with pytest.raises(ValueError, match=r'scale must be "block" or "element", not .row.\.'):
        compress.Dense(torch.int3, scale="row")
    with pytest.raises(ValueError, match=r'scale="element" is for torch\.int4, .* not torch\.int8'):
        compress.Dense(torch.int8, scale="element")
    assert compress.Dense(torch.int4, scale="element").scale == "element"


def test_the_benchmarks_spell_it():
    (one,) = parse_strategies("dear+int3:scale=element:exempt=*.bias")
    made = one.compressor.make()
    assert (made.dtype, made.scale, made.exempt.patterns) == (torch.int3, "element", ("*.bias",))
    (one,) = parse_strategies("int3:start=100:first=int8")
    assert (one.compressor.dense_steps, one.compressor.bits_at_first) == (100, 8.0625)
    assert (one.compressor.make().start_step, one.compressor.make().start_dtype) == (100, torch.int8)
    for wrong in ("int3:scale=row", "int3:feedback=maybe", "int3:first=int4"):
        with pytest.raises(StrategyError):
            parse_strategies(wrong)
