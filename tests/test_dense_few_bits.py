"""Dense gradients in 3 bits through DDP, against the golden model; how much is sent, and what is refused."""

import pytest
import torch
from compressing import SHAPES, Prescribed, attach, backward, everyones, gradients
from owners_golden import EightBits
from owners_golden import FewBits as Golden
from place import place
from test_dense_eight_bits import LARGE
from torch.nn.parallel import DistributedDataParallel as DDP

import compress
from compress import reference_levels


def as_said(rank: int, world: int, scale: str) -> None:
    """Each rank rounds, the owner averages in float32 and rounds again; both keep what that lost."""
    compressor = compress.Dense(torch.int3, scale=scale, start_step=2, exempt=())  # by then DDP has laid its buckets
    model = attach(compressor)
    golden: dict[tuple[str, ...], Golden] = {}
    compressed = 0
    for step in range(5):
        grads = [gradients(r, step) for r in range(world)]
        have = backward(model, grads[rank])
        for key, group in compressor.groups.items():
            if step < 1 or not compressor.compresses(group):
                continue
            if key not in golden:
                golden[key] = Golden(group.numel, compressor.shard_numel(group), world, 3, scale == "element")
            if step == 1:  # the last dense one
                if scale == "element":
                    result = torch.cat([have[name].flatten() for name in key])
                    golden[key].squares = reference_levels.first_squares(result)
                continue
            want = golden[key].step([torch.cat([one[name].flatten() for name in key]) for one in grads])
            assert torch.equal(torch.cat([have[name].flatten() for name in key]), want), step
            compressed += 1
        for other in everyones(have):
            assert all(torch.equal(other[name], have[name]) for name in have), "replicas differ"
    assert compressed >= 6


def started(rank: int, world: int, scale: str) -> None:
    """The first steps are in eight bits, and what they have left unsent goes out in three."""
    compressor = compress.Dense(torch.int3, scale=scale, start_step=3, start_dtype=torch.int8, exempt=())
    model = DDP(Prescribed(SHAPES).to(place()), bucket_cap_mb=100, find_unused_parameters=True)
    compress.register(model, compressor)
    first = golden = None
    for step in range(6):
        grads = [gradients(r, step) for r in range(world)]
        have = backward(model, grads[rank])
        (group,) = compressor.groups.values()
        if first is None:
            numel, shard = group.numel, compressor.shard_numel(group)
            first, golden = (
                EightBits(numel, shard, world, torch.int8),
                Golden(numel, shard, world, 3, scale == "element"),
            )
            golden.errors, golden.owned = first.errors, first.owned
        flat = [torch.cat([one[name].flatten() for name in group.names]) for one in grads]
        result = torch.cat([have[name].flatten() for name in group.names])
        assert torch.equal(result, (first if step < 3 else golden).step(flat)), step
        if step == 2 and scale == "element":
            golden.squares = reference_levels.first_squares(result)


@pytest.mark.parametrize("scale", ["block", "element"])
def test_first_steps_in_eight_bits(pool2, scale):
    pool2.run(started, scale)


def test_a_start_in_other_bits_needs_steps():
    with pytest.raises(ValueError, match="start_dtype is of the steps before start_step, which is 0"):
        compress.Dense(torch.int3, start_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"start_dtype must be torch\.bfloat16, .* not torch\.int64"):
        compress.Dense(torch.int3, start_step=2, start_dtype=torch.int64)
    made = compress.Dense(torch.int3, start_step="warmup", start_dtype=torch.int8)
    assert made.options() == {"dtype": "torch.int3", "start_dtype": "torch.int8"}


@pytest.mark.parametrize("scale", ["block", "element"])
def test_against_the_golden_model(pool3, scale):
    pool3.run(as_said, scale)


def spared(rank: int, world: int) -> None:
    """Vectors are sent as they are, where exempt is not given, and nothing is where it names nothing."""
    mean = {name: sum(gradients(r, 0)[name] for r in range(world)) / world for name in SHAPES}
    for options, exact in (({}, {"vector", "bias"}), ({"exempt": "first"}, {"first"}), ({"exempt": ()}, set())):
        compressor = compress.Dense(torch.int3, min_compression_ratio=0.2, **options)
        have = backward(attach(compressor), gradients(rank, 0))
        assert {name for name in SHAPES if torch.equal(have[name], mean[name])} == exact
        assert compressor.state_dict()["exempt"] == sorted(exact)
    in_8_bits = compress.Dense(torch.int8, min_compression_ratio=0.2)
    backward(attach(in_8_bits), gradients(rank, 0))
    assert in_8_bits.state_dict()["exempt"] == []


def test_vectors_are_exempt(pool2):
    pool2.run(spared)


def bytes_sent(rank: int, world: int) -> None:
    """To 16 bits as the bits of an element to 16, and less than 5% more for the steps, padding included."""
    sent = {}
    for dtype in (torch.bfloat16, torch.int4, torch.int3, torch.int2):
        compressor = compress.Dense(dtype, exempt=())
        model = attach(compressor, net=Prescribed(LARGE), bucket_cap_mb=25)
        for step in range(3):
            backward(model, gradients(rank, step, LARGE))
        sent[dtype] = compressor.stats()["bytes_sent"]
    for dtype, bits in ((torch.int4, 4), (torch.int3, 3), (torch.int2, 2)):
        share = sent[dtype] / sent[torch.bfloat16] * 16
        assert bits < share < (bits + 1 / 8) * 1.03


def test_bytes_sent(pool2):
    pool2.run(bytes_sent)


def test_error_feedback_is_the_default():
    for dtype, ratio in ((torch.int4, 8), (torch.int3, 32 / 3), (torch.int2, 16)):
        assert compress.Dense(dtype).error_feedback and compress.Dense(dtype).usual_ratio == ratio
        assert not compress.Dense(dtype, error_feedback=False).error_feedback
