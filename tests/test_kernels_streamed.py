"""Results that are large enough to be written past the caches: Note [Streamed results]. The same bits as the parts of
which each is small enough to be written plainly, at any alignment, and nothing beside them."""

from collections.abc import Callable

import pytest
import torch
from compressing import Prescribed, attach, backward, gradients
from kernel_cases import gradient, same_bits
from torch import Tensor
from workers import WorkerPool

import compress
from compress import ops

STREAMED = 1 << 18  # kStreamed of kernels/cpu/streamed.h
N = STREAMED + 77
GUARD = 32  # elements on both sides of a result
OWNERS = 3

Decode = Callable[[Tensor], object]


def eight_bits() -> tuple[Decode, Decode]:
    shard = ops.quantize_shard_numel(-(-N // OWNERS))
    payload = torch.zeros(OWNERS, ops.quantize_payload_numel(shard), dtype=torch.int32)
    ops.quantize_encode(gradient("normal", N), None, shard, payload, None, False, 7)

    def by_owner(out: Tensor) -> None:
        for row, own in zip(payload.split(1), out.split(shard), strict=True):
            ops.quantize_decode(row, shard, own)

    return lambda out: ops.quantize_decode(payload, shard, out), by_owner


def few_bits() -> tuple[Decode, Decode]:
    shard = ops.quantize_shard_numel(-(-N // OWNERS))
    payload = torch.zeros(OWNERS, ops.levels_payload_numel(shard, 3), dtype=torch.int32)
    ops.levels_encode(gradient("normal", N), None, shard, payload, None, 3)

    def by_owner(out: Tensor) -> None:
        for row, own in zip(payload.split(1), out.split(shard), strict=True):
            ops.levels_decode(row, shard, own, 3)

    return lambda out: ops.levels_decode(payload, shard, out, 3), by_owner


def sign() -> tuple[Decode, Decode]:
    payload = torch.zeros(ops.sign_payload_numel(N), dtype=torch.int32)
    ops.sign_encode(gradient("normal", N), None, payload)
    part = 16 * 4096

    def by_parts(out: Tensor) -> None:
        for words, own in zip(payload.split(ops.sign_payload_numel(part)), out.split(part), strict=True):
            ops.sign_decode(words, own)

    return lambda out: ops.sign_decode(payload, out), by_parts


def top_k() -> tuple[Decode, Decode]:
    shard, capacity = ops.shard_numel(N, OWNERS), 3_000
    slots = torch.zeros(OWNERS, ops.topk_slot_numel(capacity), dtype=torch.int32)
    stats, scratch = torch.zeros(2, dtype=torch.int32), torch.zeros(ops.topk_workspace_numel(N), dtype=torch.int32)
    grad = gradient("normal", N)
    ops.topk_select(grad, torch.zeros(N), grad.abs().quantile(0.99).view(1), None, shard, slots, stats, scratch)

    def by_owner(out: Tensor) -> None:
        for slot, own in zip(slots.split(1), out.split(shard), strict=True):
            ops.topk_decode(slot, own, shard)

    return lambda out: ops.topk_decode(slots, out, shard), by_owner


def low_rank(rank: int) -> tuple[Decode, Decode]:
    count, side = 3, 300
    p, q = torch.randn(2, count, side, rank).unbind()
    starts = torch.tensor([100_001, 0, 200_003])  # what lies between matrices is not written

    def one_by_one(out: Tensor) -> None:
        for one in range(count):
            ops.low_rank_decode(p[one : one + 1], q[one : one + 1], out, starts[one : one + 1])

    return lambda out: ops.low_rank_decode(p, q, out, starts), one_by_one


FAMILIES = {
    "8 bits": eight_bits,
    "few bits": few_bits,
    "sign": sign,
    "top-k": top_k,
    "low rank": lambda: low_rank(4),
    "low rank, two tiles": lambda: low_rank(7),
}


@pytest.mark.parametrize("offset", [0, 1, 13])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_result_is_that_of_its_parts(family: str, offset: int) -> None:
    torch.manual_seed(0)
    whole, parts = FAMILIES[family]()
    numel = 300_003 if "low rank" in family else N
    found = []
    for decode in (whole, parts):
        memory = torch.full((numel + 2 * GUARD,), 7.0)
        decode(memory[GUARD + offset : GUARD + offset + numel])
        found.append(memory)
    assert same_bits(*found)
    assert (found[0] != 7.0).sum() >= STREAMED, "a result that is large"


def sixteen_bits(rank: int, world: int) -> None:
    """Through a compressor, since no operator decodes 16 bits: rounded by each rank, and once more by the owner."""
    shapes = {"bias": (3,), "large": (600, 500)}
    model = attach(compress.Dense(torch.bfloat16), net=Prescribed(shapes), bucket_cap_mb=25)
    for step in range(2):
        grads = [gradients(r, step, shapes) for r in range(world)]
        have = backward(model, grads[rank])
        for name in shapes:
            mean = torch.stack([grad[name].bfloat16().float() for grad in grads]).sum(0) / world
            assert torch.equal(have[name], mean.bfloat16().float()), name


def test_sixteen_bits(pool2: WorkerPool) -> None:
    pool2.run(sixteen_bits)
