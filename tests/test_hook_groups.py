"""A compressor under DDP's own call, of a module that is trained by a part of the ranks: it averages over these."""

import copy
import gc

import compressing
import pytest
import torch
import torch.distributed as dist
from compressing import Prescribed, backward, gradients
from torch.nn.parallel import DistributedDataParallel as DDP

import compress


def exact(**options):
    """Sends all of a gradient."""
    return compress.TopK(density=1.0, **options)


def pairs(rank):
    """The group of this rank, of two: [0, 2] and [1, 3]."""
    return [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]


def mean(ranks, step):
    each = [gradients(rank, step) for rank in ranks]
    return {name: sum(grads[name] for grads in each) / len(each) for name in each[0]}


def averages(model, rank, ranks, steps=3):
    for step in range(steps):
        have = backward(model, gradients(rank, step))
        for name, want in mean(ranks, step).items():
            torch.testing.assert_close(have[name], want, msg=lambda text, name=name: f"{name}: {text}")


def of_the_module(rank, world):
    group = pairs(rank)
    compressor = exact()
    model = compressing.attach(compressor, named=False, process_group=group)
    averages(model, rank, [rank % 2, rank % 2 + 2])
    assert compressor.ranks() is group
    everyone = exact()
    averages(compressing.attach(everyone, named=False), rank, range(world))
    assert everyone.ranks() is dist.group.WORLD


def test_the_group_is_that_of_the_module(pool4):
    pool4.run(of_the_module)


def several_modules(rank, world):
    """Of modules over the same parameters the one counts whose hook it is; also where the hook is within another."""
    net = Prescribed()
    in_the_world, in_pairs = DDP(net), DDP(net, process_group=pairs(rank))
    in_pairs.register_comm_hook(exact(), compress.comm_hook)
    averages(in_pairs, rank, [rank % 2, rank % 2 + 2])

    compressor = exact()

    def within(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return compress.comm_hook(compressor, bucket)

    alone = DDP(Prescribed(), process_group=in_pairs.process_group)
    alone.register_comm_hook(None, within)
    averages(alone, rank, [rank % 2, rank % 2 + 2])
    compressor = exact()
    in_the_world.register_comm_hook(None, within)
    with pytest.raises(ValueError, match=r"cannot tell which process group .* since 2 were found: pass process_group="):
        backward(in_the_world, gradients(rank, 0))


def test_several_modules(pool4):
    pool4.run(several_modules)


def hidden(rank, world):
    """gc.freeze() hides the module: the only group there is is its, and else the script must say."""
    models = [compressing.attach(exact(), named=False)]
    group = None
    gc.freeze()
    try:
        averages(models[0], rank, range(world), 1)
        gc.unfreeze()
        group = pairs(rank)
        models += [compressing.attach(exact(**o), named=False, process_group=group)
                   for o in ({}, {"process_group": group})]  # fmt: skip
        gc.freeze()
        with pytest.raises(ValueError, match="since 0 were found: pass process_group= to the compressor"):
            backward(models[1], gradients(rank, 0))
        averages(models[2], rank, [rank % 2, rank % 2 + 2], 1)
    finally:
        gc.unfreeze()


def test_a_module_that_is_not_found(pool4):
    pool4.run(hidden)


def resumes(rank, world, named):
    """A state is loaded for the ranks of the model's group; one that was loaded for others is refused."""
    group = pairs(rank)

    def trained(compressor, steps, state=None, **options):
        model = compressing.attach(compressor, named, process_group=group, **options)
        if state is not None:
            compressor.load_state_dict(state)
        return [backward(model, gradients(rank, step)) for step in steps]

    whole, first, second = (compress.TopK(density=0.1) for _ in range(3))
    want = trained(whole, range(4))
    trained(first, range(2))
    state = copy.deepcopy(first.state_dict(gather=True))
    assert [one["rank"] for one in state["ranks"]] == [0, 1]
    have = trained(second, range(2, 4), state)
    for a, b in zip(want[2:], have, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)

    early = compress.TopK(density=0.1)
    early.load_state_dict(state)
    with pytest.raises(ValueError, match=r"loaded for the ranks of the default process group.*pass process_group="):
        trained(early, range(1))
    told = compress.TopK(density=0.1, process_group=group)
    told.load_state_dict(state)
    trained(told, range(2, 3))


@pytest.mark.parametrize("named", [True, False])
def test_states_are_loaded_for_the_ranks_of_the_module(pool4, named):
    pool4.run(resumes, named)
