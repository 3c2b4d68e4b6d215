"""Compressors between nodes alone: two nodes of two ranks each, against what one level does with the nodes' means."""

import os
import re
import signal
from unittest import mock

import compressing
import pytest
import test_dense_few_bits
import torch
import training
from compressing import backward, everyones, gradients
from place import place
from test_dense_eight_bits import Golden
from torch.nn.parallel import DistributedDataParallel as DDP
from workers import WorkerDied, run_workers

import compress
import dear
from compress import binding, reference

SIZE, NODES, STEPS = 2, 2, 6
#: Each place of a node has two of them, which do not lie side by side.
SHAPES = {"matrix": (150, 200), "vector": (30_000,), "other": (90, 300), "last": (26_000,)}
#: Each place has one run of the group.
RUNS = {"matrix": (150, 200), "vector": (30_000,)}
#: Each place has something that low-rank compressors compress.
MATRICES = {"matrix": (150, 200), "other": (90, 300)}
KINDS = {
    "topk": lambda: compress.TopK(density=0.02, slack=50, min_compression_ratio=0.1),
    "sign": compress.SignSGD,
    "int8": lambda: compress.Dense(torch.int8, min_compression_ratio=0.2),
    "bf16": lambda: compress.Dense(torch.bfloat16, error_feedback=True),
    "power": lambda: compress.PowerSGD(rank=3, factor_dtype=torch.float32),
    "local": lambda: compress.LocalPowerSGD(rank=3, factor_dtype=torch.float32),
    "int3": lambda: compress.Dense(torch.int3, min_compression_ratio=0.2, exempt=()),
}


def attach(compressor, shapes=SHAPES, **ddp):
    """One bucket, which DDP does not rebuild."""
    ddp = {"bucket_cap_mb": 100, "find_unused_parameters": True} | ddp
    model = DDP(compressing.Prescribed(shapes).to(place()), **ddp)
    compress.register(model, compressor, hierarchy=SIZE)
    return model


class OneLevel:
    """What one place of the nodes sends, by plain torch."""

    def __init__(self, kind, compressor, group):
        self.kind, self.n = kind, group.numel
        self.shard = compressor.shard_numel(group)
        self.matrices = [member for member in group.members if member.columns > 1]
        q = {m.name: torch.randn(m.columns, 3, generator=compressor.generator(m.name)) for m in self.matrices}
        self.qs = [dict(q) for _ in range(NODES)]  # by node; Power-SGD has one for all
        self.errors = [torch.zeros(self.n) for _ in range(NODES)]
        self.owner_error = torch.zeros(self.n)
        self.eight = Golden(self.n, self.shard, NODES, torch.int8)
        self.three = test_dense_few_bits.Golden(self.n, self.shard, NODES, 3)

    def step(self, means):
        if self.kind == "topk":
            return reference.topk_step(means, self.errors, self.owner_error, max(1, round(0.02 * self.n)), self.shard)
        if self.kind == "sign":
            return reference.sign_step(means, self.errors, self.owner_error)
        if self.kind == "bf16":
            rounded = [reference.dense_round(*one, torch.bfloat16) for one in zip(means, self.errors, strict=True)]
            self.errors = [error for _, error, _ in rounded]
            sent, self.owner_error, _ = reference.dense_average(
                torch.stack([r for r, _, _ in rounded]), self.owner_error
            )
            return sent.float()
        if self.kind == "power":
            return self.power_step(means, self.errors, self.qs[0])
        if self.kind == "local":
            each = zip(means, self.errors, self.qs, strict=True)
            return torch.stack([self.power_step([mean], [error], q) for mean, error, q in each]).mean(0)
        return (self.three if self.kind == "int3" else self.eight).step(means)

    def power_step(self, means, errors, q):
        result = torch.stack(means).mean(0)
        for m in self.matrices:
            cut, shape = slice(m.start, m.stop), (m.rows, m.columns)
            ours, owed = ([each[cut].view(shape) for each in one] for one in (means, errors))
            update, q[m.name] = reference.power_step(ours, owed, q[m.name])
            result[cut] = update.flatten()
        return result


def as_said(rank, world, kind, shapes):
    compressor = KINDS[kind]()
    model, golden = attach(compressor, shapes), None
    for step in range(STEPS):
        have = backward(model, gradients(rank, step, shapes))
        (group,) = compressor.groups.values()
        places, mine = compressor.levels.places, group.inner.names
        assert sorted(places.values()) == sorted([0, 1] * (len(shapes) // 2)) and len(mine) == len(shapes) // 2
        if kind not in ("power", "local"):
            assert set(compressor.feedback.errors) == set(mine), "error feedback exists once in a node"
        golden = golden or OneLevel(kind, compressor, group.inner)
        everyone = [gradients(r, step, shapes) for r in range(world)]
        means = []
        for node in range(NODES):
            one, two = everyone[SIZE * node], everyone[SIZE * node + 1]
            means.append(torch.cat([((one[name] + two[name]) / 2).flatten() for name in mine]))
        want = golden.step(means)
        result = torch.cat([have[name].flatten() for name in mine])
        if kind in ("power", "local") and place().type == "cuda":  # which multiplies and orthogonalises in other orders
            torch.testing.assert_close(result, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))
        elif kind in ("sign", "power", "local"):
            torch.testing.assert_close(result, want)
        else:
            assert torch.equal(result, want), step
        for other in everyones(have):
            assert all(torch.equal(other[name], have[name]) for name in shapes), "replicas differ"


@pytest.mark.parametrize("kind", KINDS)
def test_against_the_golden_model(pool4, kind):
    pool4.run(as_said, kind, SHAPES)
    pool4.run(as_said, kind, RUNS)
    pool4.run(as_said, kind, MATRICES)


LESS_WORTH = {
    "topk": lambda values, **options: compress.TopK(density=values, **options),
    "local": lambda values, **options: compress.LocalPowerSGD(rank=values, **options),
}
VALUES = {"topk": (0.02, 0.9), "local": (3, 80)}
OPTION = {"topk": "density", "local": "rank"}
ONE = {"matrix": (150, 200)}  # of the other place there is nothing


def less_worth(rank, world, kind, shapes):
    """What was compressed once goes on so: the ranks of another place know that, too, who owe nothing of it."""
    make, (before, behind) = LESS_WORTH[kind], VALUES[kind]
    planned = make([(0, before), (2, behind)], min_compression_ratio=0.01)
    changed, resumed = make(before), make(before)
    one, two = attach(planned, shapes), attach(changed, shapes)
    for step in range(STEPS):
        if step == 2:
            setattr(changed, OPTION[kind], behind)
        if step == 4:
            state = changed.state_dict()
            two = attach(resumed, shapes)
            resumed.load_state_dict(state)
        want, have = (backward(model, gradients(rank, step, shapes)) for model in (one, two))
        assert all(torch.equal(have[name], want[name]) for name in shapes), step


@pytest.mark.parametrize("shapes", [SHAPES, ONE], ids=["both places", "one place"])
@pytest.mark.parametrize("kind", LESS_WORTH)
def test_what_was_compressed_goes_on_so_in_all_places(pool4, kind, shapes):
    pool4.run(less_worth, kind, shapes)


def told_inside(rank, world):
    """Where results can be made of what was sent between nodes, that is what the ranks of a node tell each other."""
    sent = {}
    for kind in ("topk", "sign", "acp", "local"):
        compressor = compressing.KINDS[kind]()
        model = attach(compressor, MATRICES)
        for step in range(2):
            backward(model, gradients(rank, step, MATRICES))
        sent[kind] = compressor.stats()["bytes_sent"]
    numel = sum(torch.Size(shape).numel() for shape in MATRICES.values())
    mean_in_node = 4 * numel // 2  # each rank sends half of its gradient to the other
    for kind in ("topk", "sign", "local"):
        assert mean_in_node < sent[kind] < 1.3 * mean_in_node, sent
    assert sent["acp"] > 2 * mean_in_node, sent


def test_a_node_is_told_what_was_sent(pool4):
    pool4.run(told_inside)


def later(rank, world):
    """Dense until a step, and then compressed, in groups of which one place's members are too few to be."""
    shapes = {"matrix": (150, 200), "few": (40,)}
    compressor = compress.SignSGD(start_step=2)
    model = attach(compressor, shapes)
    for step in range(4):
        have = backward(model, gradients(rank, step, shapes))
        mean = {name: torch.stack([gradients(r, step, shapes)[name] for r in range(world)]).mean(0) for name in shapes}
        torch.testing.assert_close(have["few"], mean["few"])
        exact = torch.allclose(have["matrix"], mean["matrix"], atol=1e-5)
        assert exact == (step < 2), step
        for other in everyones(have):
            assert all(torch.equal(other[name], have[name]) for name in shapes), "replicas differ"


def test_dense_first_and_where_it_is_not_worth_it(pool4):
    pool4.run(later)


def conserved(rank, world, kind):
    """What was applied and what is left is the sum of the gradients, also where DDP rebuilds its buckets."""
    compressor = compressing.KINDS[kind]()
    model = DDP(compressing.Prescribed().to(place()), **compressing.SEVERAL_BUCKETS)
    compress.register(model, compressor, hierarchy=SIZE)
    given = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in compressing.SHAPES.items()}
    for step in range(STEPS):
        have = backward(model, gradients(rank, step))
        for name in given:
            mean = torch.stack([gradients(r, step)[name] for r in range(world)]).double().mean(0)
            given[name] += mean - have[name].double()
    left = {name: torch.zeros_like(value).flatten() for name, value in given.items()}
    for state in everyones(compressor.state_dict()):
        for name, error in state["errors"].items():
            left[name] += error.cpu().double() / NODES
        for name, (first, values) in state["owned"].items():
            left[name][first : first + values.numel()] += values.cpu().double()
    for name, value in given.items():
        assert (value.flatten() - left[name]).abs().max() < 2e-4, name


@pytest.mark.parametrize("kind", ["topk", "sign", "int8", "acp", "power", "power8", "local", "threshold", "parts"])
def test_nothing_is_lost(pool4, kind):
    pool4.run(conserved, kind)


def scheduled(rank, world, kind):
    """Under the schedule: a resumed run is the run that would have been."""

    def run(numbers, state=None):
        compressor = compressing.KINDS[kind]()
        model, optimizer = training.build("Mlp", training.SGD, {})
        if state is not None:
            model.load_state_dict(state[0])
        engine = dear.attach(model, optimizer, compressor=compressor, hierarchy=SIZE, bucket_cap_mb=0.002)
        if state is not None:
            engine.load_state_dict(state[1])
        losses = [training.plain_step(model, optimizer, rank, step) for step in numbers]
        model.eval()
        kept = {name: value.clone() for name, value in model.state_dict().items()}, engine.state_dict()
        engine.detach()
        return losses, kept

    whole, _ = run(range(6))
    first, state = run(range(3))
    second, _ = run(range(3, 6), state)
    assert first + second == whole


@pytest.mark.parametrize("kind", ["topk", "sign", "power", "local"])
def test_a_resumed_run_is_the_run_that_would_have_been(pool4, kind):
    pool4.run(scheduled, kind)


def halves(rank, world):
    """The last exchange between nodes may wait for the next forward pass, as it may in one level."""
    for kind, make in KINDS.items():
        compressor = make()
        backward(attach(compressor), gradients(rank, 0, SHAPES))
        (group,) = compressor.groups.values()
        inner, stages = group.inner.codec, group.codec.stages(0)
        assert inner.first_stages(0) == inner.stages(0) - 1, kind
        assert group.codec.first_stages(0) == 1 + inner.first_stages(0) <= stages - 2, kind


def test_both_halves_move_between_nodes(pool4):
    pool4.run(halves)


def not_finite(rank, world, kind, shapes):
    """Each rank raises, also where the gradient that is not finite is of another node and place."""
    compressor = compressing.KINDS[kind]()
    model = attach(compressor, shapes)
    for step in range(3):
        grads = gradients(rank, step, shapes)
        if step == 1 and rank == 3:
            grads["matrix"][0, 0] = torch.inf
        if step != 1:
            backward(model, grads)
            continue
        with pytest.raises(RuntimeError, match="is not finite"):
            backward(model, grads)
    assert all(error.isfinite().all() for error in compressor.feedback.errors.values())


@pytest.mark.parametrize("kind", ["topk", "acp", "power", "local"])
def test_a_gradient_that_is_not_finite_is_seen_by_all(pool4, kind):
    pool4.run(not_finite, kind, SHAPES)
    pool4.run(not_finite, kind, MATRICES)


def agreed(rank, world, algorithm):
    """Ranks agree by a lane that moves host tensors, whatever the lanes of gradients are."""
    model, optimizer = training.build("Mlp", training.SGD, {})
    compressor = compressing.KINDS["topk"]()
    with (
        mock.patch.object(binding, "agree", wraps=binding.agree) as agree,
        dear.attach(model, optimizer, compressor=compressor, hierarchy=SIZE, algorithm=algorithm),
    ):
        training.plain_step(model, optimizer, rank, 0)
    lanes = [call.args[-1] for call in agree.call_args_list]
    assert lanes and all((lane is None) == (algorithm == "native") for lane in lanes)


@pytest.mark.parametrize("algorithm", ["ring", "native"])
def test_ranks_agree_by_host_tensors(pool4, algorithm):
    pool4.run(agreed, algorithm)


def refused(rank, world):
    compressor = compress.TopK(density=0.05)
    backward(attach(compressor), gradients(rank, 0, SHAPES))
    other = compress.TopK(density=0.05)
    other.load_state_dict(compressor.state_dict())
    model = DDP(compressing.Prescribed(SHAPES))
    compress.register(model, other)
    before, now = "two levels of the nodes [[0, 1], [2, 3]]", "one level"
    says = "was saved in {}, and training runs in {}: start as many ranks"
    with pytest.raises(ValueError, match=re.escape(says.format(before, now))):
        backward(model, gradients(rank, 1, SHAPES))
    at_work = compress.TopK(density=0.05)
    backward(attach(at_work), gradients(rank, 0, SHAPES))
    state = compressor.state_dict() | {"nodes": None}
    with pytest.raises(ValueError, match=re.escape(says.format(now, before))):
        at_work.load_state_dict(state)


def test_what_does_not_fit_is_refused(pool4):
    pool4.run(refused)


def frozen_since(rank, world):
    """A parameter that is frozen behind DDP stays in its buckets."""
    model = DDP(compressing.Prescribed(SHAPES), bucket_cap_mb=100, find_unused_parameters=True)
    next(model.parameters()).requires_grad_(False)
    compress.register(model, compress.SignSGD(), hierarchy=SIZE)
    return list(backward(model, gradients(rank, 0, SHAPES)).values())


def test_a_parameter_may_be_frozen_since(pool4):
    results = pool4.run(frozen_since)
    for mine, *theirs in zip(*results, strict=True):
        assert all(torch.equal(one, mine) for one in theirs)


def dies(rank, world):
    model = attach(compress.TopK(density=0.05))
    for step in range(6):
        if rank == 3 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        backward(model, gradients(rank, step, SHAPES))


@pytest.mark.slow
def test_a_dead_peer_is_named_on_every_rank():
    results = run_workers(dies, 4, expect_dead={3})
    assert isinstance(results[3], WorkerDied)
    for rank in range(3):
        assert "Rank 3 " in str(results[rank]), results[rank]
