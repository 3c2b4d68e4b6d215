"""Dense gradients in 3 bits through DDP, against the golden model; how much is sent, and what is refused."""

import torch
from compressing import Prescribed, attach, backward, everyones, gradients
from test_dense_eight_bits import LARGE
from torch import Tensor

import compress
from compress import reference_levels
from compress.reference_levels import STEP_BLOCK, Levelled


class Golden:
    """One group of all ranks."""

    def __init__(self, numel: int, shard: int, world: int, bits: int) -> None:
        self.bits = bits
        self.errors = [torch.zeros(numel) for _ in range(world)]
        self.ranges = [(min(r * shard, numel), min((r + 1) * shard, numel)) for r in range(world)]
        self.owned = [torch.zeros(end - begin) for begin, end in self.ranges]

    def step(self, grads: list[Tensor]) -> Tensor:
        said, result = [], torch.zeros_like(grads[0])
        for rank, grad in enumerate(grads):
            one, self.errors[rank], _ = reference_levels.encode(grad, self.errors[rank], self.bits)
            said.append(one)
        for owner, (begin, end) in enumerate(self.ranges):
            blocks = slice(begin // STEP_BLOCK, -(-end // STEP_BLOCK))
            rows = [Levelled(one.levels[begin:end], one.steps[blocks]) for one in said]
            merged, self.owned[owner], _ = reference_levels.average(rows, self.owned[owner], self.bits)
            result[begin:end] = merged.decoded()
        return result


def as_said(rank: int, world: int) -> None:
    """Each rank rounds, the owner averages in float32 and rounds again; both keep what that lost."""
    compressor = compress.Dense(torch.int3, start_step=2)  # by then DDP has laid its buckets
    model = attach(compressor)
    golden: dict[tuple[str, ...], Golden] = {}
    compressed = 0
    for step in range(5):
        grads = [gradients(r, step) for r in range(world)]
        have = backward(model, grads[rank])
        for key, group in compressor.groups.items():
            if step < 2 or not compressor.compresses(group):
                continue
            if key not in golden:
                golden[key] = Golden(group.numel, compressor.shard_numel(group), world, 3)
            want = golden[key].step([torch.cat([one[name].flatten() for name in key]) for one in grads])
            assert torch.equal(torch.cat([have[name].flatten() for name in key]), want), step
            compressed += 1
        for other in everyones(have):
            assert all(torch.equal(other[name], have[name]) for name in have), "replicas differ"
    assert compressed >= 6


def test_against_the_golden_model(pool3):
    pool3.run(as_said)


def bytes_sent(rank: int, world: int) -> None:
    """To 16 bits as the bits of an element to 16, and less than 5% more for the steps, padding included."""
    sent = {}
    for dtype in (torch.bfloat16, torch.int4, torch.int3, torch.int2):
        compressor = compress.Dense(dtype)
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
