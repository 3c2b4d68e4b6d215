"""What error feedback, replicas and saved state promise, for every compressor."""

import itertools

import pytest
import torch
from compressing import KINDS, SHAPES, Sometimes, attach, backward, everyones, gradients, kept
from torch import Tensor

import compress

each_kind = pytest.mark.parametrize("kind", KINDS)


class Account:
    """Gradients in, results and kept errors out: the sums must agree."""

    def __init__(self) -> None:
        self.given = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        self.applied = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}

    def add(self, world: int, step: int, result: dict[str, Tensor]) -> None:
        for name in SHAPES:
            self.given[name] += sum(gradients(r, step)[name].double() for r in range(world))
            self.applied[name] += world * result[name].double()

    def check(self, compressor: compress.Compressor) -> None:
        errors = kept(compressor)
        assert errors, "nothing was compressed"
        for name in SHAPES:
            balance = self.given[name] - self.applied[name]
            if name in errors:
                balance -= errors[name].view(SHAPES[name])
            assert balance.abs().max() < 2e-5, (name, float(balance.abs().max()))


def conserved(rank: int, world: int, kind: str, named: bool, view: bool) -> None:
    """Over the bucket rebuild, with errors from before it or a late start, and each rank seeded in its own way."""
    torch.manual_seed(17 * rank)
    compressor = KINDS[kind](start_step=0 if world == 2 else 1)
    model = attach(compressor, named, gradient_as_bucket_view=view)
    account = Account()
    seen = set()
    for step in range(5):
        before = torch.get_rng_state()
        result = backward(model, gradients(rank, step))
        assert torch.equal(before, torch.get_rng_state()), "the user's random state was touched"
        seen.add(tuple(compressor.groups))
        if named:
            account.add(world, step, result)
            account.check(compressor)
        everyone = everyones(result)
        for other, name in itertools.product(everyone, SHAPES):
            assert torch.equal(other[name], result[name]), "replicas differ"
    assert len(compressor.groups) > 1, "DDP was to rebuild its buckets"
    assert len(seen) == (1 if named else 2), "DDP was to rebuild them once, registered in the first pass"


@each_kind
@pytest.mark.parametrize("world", [2, 4])
def test_nothing_is_lost(pool2, pool4, world, kind):
    (pool2 if world == 2 else pool4).run(conserved, kind, True, world == 2)


@each_kind
def test_by_ddps_own_call(pool2, kind):
    pool2.run(conserved, kind, False, True)


def resume(rank: int, world: int, kind: str, named: bool, gather: bool) -> None:
    first = KINDS[kind]()
    model = attach(first, named)
    for step in range(4):
        backward(model, gradients(rank, step))
    state = first.state_dict(gather=gather)
    want = [backward(model, gradients(rank, step)) for step in range(4, 8)]

    second = KINDS[kind](seed=99)  # the state's counts
    second.load_state_dict(state)
    model = attach(second, named)
    for step, expected in zip(range(4, 8), want, strict=True):
        have = backward(model, gradients(rank, step))
        for name in SHAPES:
            assert torch.equal(have[name], expected[name]), (step, name)
    # And back, in a compressor that has gone on.
    first.load_state_dict(state)
    for name, value in backward(model=attach_again(first, named), grads=gradients(rank, 4)).items():
        assert torch.equal(value, want[0][name])


def attach_again(compressor: compress.Compressor, named: bool):
    """The compressor on a fresh DDP module, as after a restart in the same process."""
    vars(compressor)["binding"] = None
    return attach(compressor, named)


@each_kind
@pytest.mark.parametrize("world", [2, 4])
def test_resume_bit_for_bit(pool2, pool4, world, kind):
    (pool2 if world == 2 else pool4).run(resume, kind, world == 2, world == 4)


def save(rank: int, world: int, kind: str) -> dict:
    compressor = KINDS[kind]()
    model = attach(compressor)
    for step in range(4):
        backward(model, gradients(rank, step))
    return compressor.state_dict()


def load_elsewhere(rank: int, world: int, kind: str, states: list[dict]) -> dict[str, Tensor]:
    compressor = KINDS[kind]()
    compressor.load_state_dict(states)
    before = kept(compressor)
    model = attach(compressor)
    result = backward(model, gradients(rank, 4))
    after = kept(compressor)
    given = {name: sum(gradients(r, 4)[name].double() for r in range(world)).flatten() for name in SHAPES}
    for name, error in before.items():
        balance = error + given[name] - world * result[name].double().flatten() - after[name]
        assert balance.abs().max() < 5e-5, name
    return before


@each_kind
@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4)])
def test_another_world_size_owes_the_same(pool2, pool4, kind, old, new):
    """Parameters move by the mean over the ranks."""
    pools = {2: pool2, 4: pool4}
    states = pools[old].run(save, kind)
    want: dict[str, Tensor] = {}
    for state in states:
        for name, error in state["errors"].items():
            total = error.double()
            first, values = state["owned"].get(name, (0, error[:0]))
            total[first : first + values.numel()] += old * values.double()
            want[name] = want.get(name, 0) + total
    for before in pools[new].run(load_elsewhere, kind, states):
        assert before.keys() == want.keys()
        for name, error in want.items():
            torch.testing.assert_close(before[name] / new, error / old, rtol=0, atol=1e-5)


def alone(rank: int, world: int) -> None:
    for kind, make in KINDS.items():
        compressor = make()
        model = attach(compressor)
        account = Account()
        for step in range(3):
            account.add(world, step, backward(model, gradients(rank, step)))
            account.check(compressor)
        assert compressor.stats()["bytes_sent"] == 0, kind


def test_world_of_one(pool1):
    pool1.run(alone)


def unused(rank: int, world: int) -> None:
    """A parameter no rank uses in a step keeps its error, and its .grad stays as DDP leaves it."""
    shapes = {"often": (200, 100), "rarely": (100, 200)}

    for kind, make in KINDS.items():
        compressor = make()
        model = attach(compressor, net=Sometimes(shapes), find_unused_parameters=True)
        given = torch.zeros(20_000, dtype=torch.float64)
        for step in range(5):
            grads = gradients(rank, step, shapes)
            if step % 2:
                del grads["rarely"]
            else:
                given += sum(gradients(r, step, shapes)["rarely"].double().flatten() for r in range(world))
            have = backward(model, grads)
            assert ("rarely" in have) == (step % 2 == 0), kind
            if "rarely" in have:
                given -= world * have["rarely"].double().flatten()
            assert (given - kept(compressor)["rarely"]).abs().max() < 2e-5, (kind, step)


def test_unused_parameters_keep_their_error(pool2):
    pool2.run(unused)
